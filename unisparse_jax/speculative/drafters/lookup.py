# SPDX-License-Identifier: Apache-2.0
"""Drafts that copy what followed an earlier occurrence of the last tokens.

Neither drafter has weights or a state: both read the tokens known so far, and
propose a whole tree at once, in a handful of fused array operations.

Source: prompt lookup decoding (Saxena, 2023); SuffixDecoding (Oliaro et al.,
2024, arXiv 2411.04975). Differs from the latter in: matches are found by
comparing, not in a suffix tree; the matches of all lengths vote, weighted by
length, where it grows one tree per length and takes the best.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels import checks
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree
from unisparse_jax.speculative.drafters import base


class _Lookup:
  """What the drafters of this file have in common."""

  needs_taps = False
  max_match: int

  def check(self, target: Any, shape: tree.TreeShape):
    """See `base.Drafter`."""
    del target, shape

  def init(self, target: Any, *, batch: int, capacity: int) -> Any:
    """See `base.Drafter`."""
    del target, batch, capacity
    return ()

  def extend(self, target, state, committed, *, is_prefill, attention_fn):
    """See `base.Drafter`."""
    del target, committed, is_prefill, attention_fn
    return state

  def longest_match(self, context: base.Context) -> Int[Array, " batch"]:
    """Tokens of the longest match, 0 to max_match; as in `draft`, not again."""
    tokens, lengths = context.tokens, context.lengths
    run = _match_lengths(tokens, tokens, lengths, self.max_match)
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    longest = jnp.max(
      jnp.where(position < lengths[:, None] - 1, run, 0), axis=-1
    )
    corpus = getattr(self, "corpus", None)
    if corpus is None:
      return longest
    text = corpus.astype(jnp.int32)[None]
    run = _match_lengths(text, tokens, lengths, self.max_match)
    return jnp.maximum(longest, jnp.max(run[:, :-1], axis=-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup(_Lookup):
  """A chain: what followed the latest of the longest matches.

  Attributes:
    max_match: longest suffix compared, tokens.
    min_match: shortest one that counts.
    keep_rate: assumed probability that a copied token is right, in (0, 1];
      only the order of nodes across rows depends on it.
  """

  max_match: int = dataclasses.field(default=4, metadata=dict(static=True))
  min_match: int = dataclasses.field(default=1, metadata=dict(static=True))
  keep_rate: float = dataclasses.field(default=0.8, metadata=dict(static=True))

  def __post_init__(self):
    _check_matches(self.max_match, self.min_match)
    checks.check_fraction("keep_rate", self.keep_rate)

  def draft(self, target, state, context, *, shape, policy, policy_state):
    """See `base.Drafter`."""
    del target, state
    tokens, lengths = context.tokens, context.lengths
    batch, capacity = tokens.shape
    run = _match_lengths(tokens, tokens, lengths, self.max_match)
    position = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    usable = (run >= self.min_match) & (position < lengths[:, None] - 1)
    rank = jnp.where(usable, run * capacity + position, -1)
    best = jnp.argmax(rank, axis=-1).astype(jnp.int32)
    step = jnp.arange(shape.max_depth, dtype=jnp.int32)[None, :]
    source = best[:, None] + 1 + step
    found = (jnp.max(rank, axis=-1) >= 0)[:, None]
    found = found & (source < lengths[:, None])
    chain = jnp.take_along_axis(tokens, source, axis=1, mode="clip")
    scores = (step + 1).astype(jnp.float32) * math.log(self.keep_rate)
    scores = jnp.where(found, scores, tree.EMPTY)
    pool = tree.Pool(
      tokens=chain,
      parents=jnp.broadcast_to(step - 1, (batch, shape.max_depth)),
      scores=scores,
    )
    at_base = scores[:, shape.base_depth - 1]
    return _decide(
      pool,
      levels=step[0] + 1,
      entropy=jnp.zeros((batch,), jnp.float32),
      score=at_base,
      best=jnp.full((batch,), shape.base_depth - 1, jnp.int32),
      context=context,
      shape=shape,
      policy=policy,
      policy_state=policy_state,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SuffixMatch(_Lookup):
  """A tree of what followed many matches, scored by their weighted votes.

  Attributes:
    corpus: int32 [corpus_len], earlier text to search beside the row's own, or
      None. Compared in full at every step.
    max_match: longest suffix compared, tokens.
    min_match: shortest one that counts.
    num_matches: matches that vote, the longest and latest.
    sharpness: a match that is one token longer weighs exp(sharpness) times
      as much.
    keep_rate: factor on the probability of every level, in (0, 1].
    min_probability: nodes below it are left out.
    length_factor: a match of n tokens is followed for at most
      length_factor * n + length_offset tokens.
    length_offset: see length_factor.
  """

  corpus: Int[Array, " corpus_len"] | None = None
  max_match: int = dataclasses.field(default=16, metadata=dict(static=True))
  min_match: int = dataclasses.field(default=1, metadata=dict(static=True))
  num_matches: int = dataclasses.field(default=16, metadata=dict(static=True))
  sharpness: float = dataclasses.field(default=1.0, metadata=dict(static=True))
  keep_rate: float = dataclasses.field(default=0.9, metadata=dict(static=True))
  min_probability: float = dataclasses.field(
    default=0.02, metadata=dict(static=True)
  )
  length_factor: float = dataclasses.field(
    default=2.0, metadata=dict(static=True)
  )
  length_offset: int = dataclasses.field(default=2, metadata=dict(static=True))

  def __post_init__(self):
    _check_matches(self.max_match, self.min_match)
    checks.check_positive_int("num_matches", self.num_matches)
    checks.check_fraction("keep_rate", self.keep_rate)

  def draft(self, target, state, context, *, shape, policy, policy_state):
    """See `base.Drafter`."""
    del target, state
    batch = context.lengths.shape[0]
    depth, count = shape.max_depth, self.num_matches
    run, tokens, usable = self._continuations(context, depth)
    count = run.shape[1]  # fewer than num_matches in a short buffer

    # same[b, i, j, d]: continuations i and j agree in their tokens 0..d.
    agree = tokens[:, :, None, :] == tokens[:, None, :, :]
    agree = agree & usable[:, :, None, :] & usable[:, None, :, :]
    same = jnp.cumprod(agree.astype(jnp.int8), axis=-1).astype(bool)
    longest = jnp.max(run, axis=-1, keepdims=True)
    weight = jnp.exp((run - longest).astype(jnp.float32) * self.sharpness)
    weight = jnp.where(run >= self.min_match, weight, 0.0)
    total = jnp.maximum(jnp.sum(weight, axis=-1), 1e-30)[:, None, None]
    weight = weight[:, None, :, None]
    # [batch, count, depth]; sums of fewer terms are no larger after rounding.
    mass = jnp.sum(jnp.where(same, weight, 0.0), axis=2) / total
    level = jnp.arange(depth, dtype=jnp.int32)
    index = jnp.arange(count, dtype=jnp.int32)
    # The first continuation that agrees stands for all that do.
    first = jnp.min(jnp.where(same, index[None, None, :, None], count), axis=2)
    is_node = first == index[None, :, None]
    kept = self.keep_rate ** (level + 1).astype(jnp.float32)
    probability = mass * kept[None, None, :]
    is_node = is_node & (probability >= self.min_probability)
    scores = jnp.where(
      is_node, jnp.log(jnp.maximum(probability, 1e-30)), tree.EMPTY
    )
    scores = jnp.minimum(scores, 0.0)
    # Pool index of (i, d): d * count + i; its parent: (first[i, d - 1], d - 1).
    parents = jnp.pad(
      first[:, :, :-1] + (level[:-1] * count)[None, None, :],
      ((0, 0), (0, 0), (1, 0)),
      constant_values=-1,
    )

    def by_level(values):
      return jnp.swapaxes(values, 1, 2).reshape(batch, depth * count)

    pool = tree.Pool(
      tokens=by_level(tokens),
      parents=by_level(parents).astype(jnp.int32),
      scores=by_level(scores),
    )
    entropy, score, best = self._evidence(
      mass, same, weight, total, scores, shape
    )
    return _decide(
      pool,
      levels=jnp.repeat(level + 1, count, total_repeat_length=depth * count),
      entropy=entropy,
      score=score,
      best=(shape.base_depth - 1) * count + best,
      context=context,
      shape=shape,
      policy=policy,
      policy_state=policy_state,
    )

  def _continuations(self, context, depth):
    """Lengths [batch, n] of matches, and the [batch, n, depth] tokens after."""
    tokens, lengths = context.tokens, context.lengths
    run, source = self._matches(tokens, tokens, lengths, lengths - 1)
    step = jnp.arange(1, depth + 1, dtype=jnp.int32)[None, None, :]
    # [batch, n, depth]
    index = source[:, :, None] + step
    usable = index < lengths[:, None, None]
    rows = jnp.take_along_axis(
      tokens, index.reshape(tokens.shape[0], -1), axis=1, mode="clip"
    ).reshape(index.shape)
    if self.corpus is not None:
      size = self.corpus.shape[0]
      corpus = self.corpus.astype(jnp.int32)
      corpus_run, source = self._matches(
        corpus[None], tokens, lengths, jnp.full_like(lengths, size - 1)
      )
      index = source[:, :, None] + step
      found = corpus.at[index].get(mode="clip")
      run = jnp.concatenate([run, corpus_run], axis=1)
      rows = jnp.concatenate([rows, found], axis=1)
      usable = jnp.concatenate([usable, index < size], axis=1)
      run, best = lax.top_k(run, self.num_matches)
      rows = jnp.take_along_axis(rows, best[:, :, None], axis=1)
      usable = jnp.take_along_axis(usable, best[:, :, None], axis=1)
    reach = self.length_factor * run.astype(jnp.float32) + self.length_offset
    usable = usable & (step.astype(jnp.float32) <= reach[:, :, None])
    return run, rows, usable & (run >= self.min_match)[:, :, None]

  def _matches(self, text, tokens, lengths, end):
    """The longest, then latest, matches that end before `end`."""
    run = _match_lengths(text, tokens, lengths, self.max_match)
    capacity = text.shape[1]
    position = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    rank = jnp.where(position < end[:, None], run * capacity + position, -1)
    rank, source = lax.top_k(rank, min(self.num_matches, capacity))
    return jnp.where(rank < 0, 0, rank // capacity), source

  def _evidence(self, mass, same, weight, total, scores, shape):
    """Entropy and score of the best path of base_depth tokens."""
    best = jnp.argmax(scores[:, :, shape.base_depth - 1], axis=-1)
    best = best.astype(jnp.int32)

    def of_best(values):
      return jnp.take_along_axis(
        values, best.reshape(-1, *(1,) * (values.ndim - 1)), axis=1
      )[:, 0]

    # Who agrees with the best path before each level: [batch, n, depth].
    members = of_best(same)
    before = jnp.pad(members, ((0, 0), (0, 0), (1, 0)), constant_values=True)
    before = before[:, :, :-1] & (mass > 0)
    votes = jnp.where(before, weight[:, 0] / total, 0.0)
    parent = jnp.sum(votes, axis=1, keepdims=True)
    # Summed over members, p log p of every distinct token comes out once.
    share = jnp.where(before, mass / jnp.maximum(parent, 1e-30), 1.0)
    share = jnp.clip(share, 1e-30, 1.0)
    terms = votes / jnp.maximum(parent, 1e-30) * jnp.log(share)
    entropy = -jnp.sum(terms[:, :, : shape.base_depth], axis=(1, 2))
    score = of_best(scores)[:, shape.base_depth - 1]
    return jnp.maximum(entropy, 0.0), score, best


def _check_matches(max_match: int, min_match: int):
  checks.check_positive_int("min_match", min_match)
  checks.check_positive_int("max_match", max_match)
  checks.require(
    max_match >= min_match,
    "max_match",
    "be at least min_match",
    max_match,
    f"max_match >= {min_match}",
  )


def _match_lengths(text, tokens, lengths, max_match):
  """How many tokens up to each of text's agree with a row's last ones.

  Args:
    text: int32 [batch or 1, capacity].
    tokens: int32 [batch, ...], whose last tokens are looked for.
    lengths: int32 [batch], valid tokens.
    max_match: static; where counting stops.

  Returns:
    int32 [batch, capacity], 0 to max_match.
  """
  back = jnp.arange(max_match, dtype=jnp.int32)[None, :]
  index = lengths[:, None] - 1 - back
  last = jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1)
  last = jnp.where(index >= 0, last, -2)  # matches nothing
  capacity = text.shape[1]
  padded = jnp.pad(text, ((0, 0), (max_match, 0)), constant_values=-1)
  alive = jnp.bool_(True)
  run = jnp.zeros((lengths.shape[0], capacity), jnp.int32)
  for u in range(max_match):
    shifted = padded[:, max_match - u : max_match - u + capacity]
    alive = alive & (shifted == last[:, u : u + 1])
    run = run + alive.astype(jnp.int32)
  return run


def _decide(
  pool,
  *,
  levels,
  entropy,
  score,
  best,
  context,
  shape,
  policy,
  policy_state,
) -> base.Draft:
  """Lets the policy see a whole pool; `best` is the best path's pool index."""
  batch, width = context.lengths.shape[0], shape.width
  rest = ((0, 0), (0, width - 1))
  tokens = jnp.take_along_axis(pool.tokens, best[:, None], axis=1)
  exists = jnp.take_along_axis(pool.scores, best[:, None], axis=1)
  frontier = jnp.where(exists > tree.EMPTY / 2, best[:, None], -2)
  evidence = policy_lib.Evidence(
    entropy=entropy,
    score=score,
    frontier_tokens=jnp.pad(tokens, rest),
    frontier_pool_index=jnp.pad(frontier, rest, constant_values=-2),
    pool=pool,
    lengths=context.lengths,
  )
  decision = policy.decide(policy_state, evidence)
  too_deep = levels[None, :] > decision.depth[:, None]
  del batch
  return base.Draft(
    pool=dataclasses.replace(
      pool, scores=jnp.where(too_deep, tree.EMPTY, pool.scores)
    ),
    decision=decision,
    entropy=entropy,
    score=score,
    levels=jnp.int32(shape.max_depth),
  )
