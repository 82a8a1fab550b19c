# SPDX-License-Identifier: Apache-2.0
"""A lookup where the text repeats itself, a model where it does not.

A copy costs next to nothing to draft and is often longer than what a model
foresees; elsewhere it is short. A step takes whichever has brought more tokens
for its time, so far in this row: each row keeps a running mean of the tokens of
the model's steps, and of the lookup's by length of the match. The drafts depend
on nothing but steps that are over, so the output is that of plain decoding.

Replay of 40 texts of the 155M target, times plain decoding, mean of five
domains, at the step times of `LookupFirst`: 7.39. The constants were chosen on
these texts, `start` on half of them. Tried and not kept:
- a fixed shortest match of 3, 4, 5 or 6 tokens: 7.10, 7.07, 6.98, 6.92; and no
  one length also serves a weak model;
- the lookup's own probabilities instead of the length of the match: 7.32, and
  less than the model alone in word problems;
- tokens per time of the two compared, without the time's own worth: 7.33;
- counting also what the lookup would have brought in the model's steps: 7.40;
- the lookup's chain as part of the model's tree: 7.44;
- `PromptLookup(max_match=16)` instead of `SuffixMatch`: 6.99.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import checks
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree
from unisparse_jax.speculative.drafters import base, by_level

MATCHES = (1, 2, 3, 4, 6, 9, 16)  # shortest match of each class, tokens
MODEL = 0  # arm of the model; 1 + i: a match of class i


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CombinedState:
  """What the loop carries.

  Attributes:
    inner: state of the model drafter.
    tokens: float32 [batch, 1 + len(MATCHES)], running mean of the tokens that
      a step of each arm brings.
    recent_tokens: float32 scalar, discounted sum of tokens, mean over rows.
    recent_time: float32 scalar, of the same steps, in lookup steps.
  """

  inner: Any
  tokens: Float[Array, "batch arms"]
  recent_tokens: Float[Array, ""]
  recent_time: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """Who drafted a step.

  Attributes:
    arm: int32 [batch], column of `CombinedState.tokens`; -1: nobody.
    is_model: bool scalar, whether the model ran.
  """

  arm: Int[Array, " batch"]
  is_model: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupFirst:
  """Drafts by lookup or by a model, whichever pays; a policy sizes the latter.

  The model runs if that is worth its time for the batch: if the tokens that it
  is expected to add exceed the recent tokens per time, times its time. Then
  each row takes the draft that promises more. Else the lookup drafts all rows,
  with the model's levels skipped and logged as 0; the model is told the tokens
  as always. A policy that skips drafting skips the lookup too; one that learns
  counts all rows of a step in which the model ran.

  Times plain decoding in code, docs, word problems, tables and long context, by
  replay (155M target, 8 texts each of 256 tokens, greedy, batch 1) at an H100's
  step times: plain 1.974 ms, the model's tree of 8 levels and 60 nodes 2.92, a
  lookup of up to 20 tokens 1.74 (a tree of 26 nodes without its levels; 1.7 up
  to 10 tokens and 1.8 up to 32 are assumptions, as 1.64 alone):
  - up to 10 tokens 7.1, 4.5, 6.0, 5.6, 8.5; 20: 8.8, 4.9, 6.1, 6.0, 11.1; 32:
    9.5, 5.0, 6.1, 6.2, 12.1;
  - the model alone 4.6, 3.4, 5.7, 5.2, 4.2;
  - `SuffixMatch` alone, up to 10 tokens at 1.6 ms 7.0, 4.5, 3.4, 4.7, 9.5; up
    to 20 at 1.64: 8.4, 4.9, 3.5, 5.1, 12.5, so it stays ahead in the last.

  Attributes:
    lookup: `PromptLookup` or `SuffixMatch`.
    drafter: such as `Eagle` or `SmallDecoder`.
    model_cost: float32 scalar, time of a step that the drafter drafts over that
      of one that the lookup does.
    decay: float32 scalar in [0, 1), weight of the past in an arm's mean.
    drift: float32 scalar in [0, 1], how far at every step the means of the
      other arms go back to `start`, or one bad match would count for ever.
    start: tokens expected of the arms of a new row: of the model, then of a
      match of 1, 2, 3, 4 to 5, 6 to 8, 9 to 15, and 16 or more tokens.
    min_match: shortest match that is used, if the lookup's own is shorter.
    lookup_nodes: most nodes of a lookup, root not counted; the policy has no
      say in it.
    drafter_depth: `TreeShape.max_depth` of the drafter; 0: as the lookup's.
  """

  lookup: Any
  drafter: by_level.LevelDrafter
  model_cost: Float[Array, ""] | float = 1.7
  decay: Float[Array, ""] | float = 0.8
  drift: Float[Array, ""] | float = 0.02
  start: tuple[float, ...] = dataclasses.field(
    default=(5.5, 2.4, 3.4, 3.6, 4.4, 6.4, 9.3, 18.0),
    metadata=dict(static=True),
  )
  min_match: int = dataclasses.field(default=1, metadata=dict(static=True))
  lookup_nodes: int = dataclasses.field(default=31, metadata=dict(static=True))
  drafter_depth: int = dataclasses.field(default=0, metadata=dict(static=True))

  def __post_init__(self):
    checks.check_positive_int("min_match", self.min_match)
    checks.check_positive_int("lookup_nodes", self.lookup_nodes)
    checks.check_non_negative_int("drafter_depth", self.drafter_depth)
    checks.require(
      len(self.start) == 1 + len(MATCHES) and min(self.start) >= 1.0,
      "start",
      "hold the tokens of a step, at least 1, of every arm",
      self.start,
      f"{1 + len(MATCHES)} numbers >= 1",
    )

  @property
  def needs_taps(self) -> bool:
    """See `base.Drafter`."""
    return self.drafter.needs_taps

  @property
  def tap_layers(self) -> tuple[int, ...] | None:
    """See `base.Drafter`."""
    return getattr(self.drafter, "tap_layers", None)

  @property
  def fitted_drafter(self) -> Any:
    """See `base.fingerprint`."""
    return self.drafter

  def check(self, target: Any, shape: tree.TreeShape):
    """See `base.Drafter`."""
    checks.require(
      hasattr(self.lookup, "longest_match"),
      "lookup",
      "find matches",
      type(self.lookup).__name__,
      "a PromptLookup or a SuffixMatch",
    )
    checks.require(
      isinstance(self.drafter, by_level.LevelDrafter),
      "drafter",
      "draft level by level",
      type(self.drafter).__name__,
      "a LevelDrafter, such as Eagle",
    )
    for name, is_ok, rule in (
      ("model_cost", self.model_cost > 0, "be positive"),
      ("decay", 0 <= self.decay < 1, "be in [0, 1)"),
      ("drift", 0 <= self.drift <= 1, "be in [0, 1]"),
    ):
      checks.require(bool(is_ok), name, rule, getattr(self, name))
    checks.require(
      self.drafter_depth <= shape.max_depth,
      "drafter_depth",
      "be at most max_depth of the tree's shape",
      self.drafter_depth,
      f"max_depth={shape.max_depth}",
    )
    self.lookup.check(target, shape)
    self.drafter.check(target, self._drafter_shape(shape))

  def init(self, target: Any, *, batch: int, capacity: int) -> CombinedState:
    """See `base.Drafter`."""
    start = jnp.asarray(self.start, jnp.float32)
    return CombinedState(
      inner=self.drafter.init(target, batch=batch, capacity=capacity),
      tokens=jnp.broadcast_to(start[None], (batch, start.shape[0])),
      recent_tokens=start[MODEL],
      recent_time=jnp.asarray(self.model_cost, jnp.float32),
    )

  def extend(
    self,
    target: Any,
    state: CombinedState,
    committed: base.Committed,
    *,
    is_prefill: bool,
    attention_fn: Any,
  ) -> CombinedState:
    """See `base.Drafter`."""
    inner = self.drafter.extend(
      target,
      state.inner,
      dataclasses.replace(committed, record=None),
      is_prefill=is_prefill,
      attention_fn=attention_fn,
    )
    choice = committed.record
    if choice is None:  # the prompt, or plain steps
      return dataclasses.replace(state, inner=inner)
    decay = jnp.asarray(self.decay, jnp.float32)
    drift = jnp.asarray(self.drift, jnp.float32)
    count = committed.counts.astype(jnp.float32)[:, None]
    start = jnp.asarray(self.start, jnp.float32)[None, :]
    arms = jnp.arange(start.shape[1], dtype=jnp.int32)[None, :]
    tokens = jnp.where(
      arms == choice.arm[:, None],
      decay * state.tokens + (1.0 - decay) * count,
      state.tokens + drift * (start - state.tokens),
    )
    active = committed.counts > 0
    time = jnp.where(choice.is_model, self.model_cost, 1.0)
    # Slower than the arms: it stands for what comes after this step.
    keep = jnp.float32(0.95)
    return CombinedState(
      inner=inner,
      tokens=jnp.where(active[:, None], tokens, state.tokens),
      recent_tokens=keep * state.recent_tokens + _mean(count[:, 0], active),
      recent_time=keep * state.recent_time + time.astype(jnp.float32),
    )

  def draft(
    self, target, state, context, *, shape, policy, policy_state
  ) -> base.Draft:
    """See `base.Drafter`."""
    copied = self.lookup.draft(
      target,
      (),
      context,
      shape=shape,
      policy=policy_lib.Fixed(
        depth=jnp.int32(shape.max_depth), nodes=jnp.int32(self.lookup_nodes)
      ),
      policy_state=(),
    )
    by_lookup, choice = self._choose(state, context, shape.max_depth)
    inner_shape = self._drafter_shape(shape)
    size = max(copied.pool.tokens.shape[1], inner_shape.pool_size)
    served = dataclasses.replace(context, active=context.active & ~by_lookup)

    def by_model():
      made = self.drafter.draft(
        target,
        state.inner,
        served,
        shape=inner_shape,
        policy=policy,
        policy_state=policy_state,
      )
      return dataclasses.replace(made, pool=_pad(made.pool, size))

    copied = dataclasses.replace(copied, pool=_pad(copied.pool, size))
    # The drafter's cache is only read there, so nothing copies it.
    made = lax.cond(
      choice.is_model,
      by_model,
      lambda: dataclasses.replace(copied, levels=jnp.int32(0)),
    )

    def of_row(ours, models):
      return jnp.where(
        by_lookup.reshape(-1, *(1,) * (ours.ndim - 1)), ours, models
      )

    return base.Draft(
      pool=jax.tree.map(of_row, copied.pool, made.pool),
      decision=jax.tree.map(of_row, copied.decision, made.decision),
      entropy=of_row(copied.entropy, made.entropy),
      score=of_row(copied.score, made.score),
      levels=made.levels,
      record=choice,
    )

  def _choose(self, state: CombinedState, context, max_depth: int):
    """bool [batch], rows that take the lookup's draft; and the `Choice`."""
    match = self.lookup.longest_match(context)
    edges = jnp.asarray(MATCHES, jnp.int32)
    arm = jnp.sum(match[:, None] >= edges[None, :], axis=-1, dtype=jnp.int32)
    is_found = match >= max(self.min_match, self.lookup.min_match)
    # A step brings one token more than its longest draft, and at least one.
    most = jnp.float32(max_depth + 1)
    tokens = jnp.take_along_axis(state.tokens, arm[:, None], axis=1)[:, 0]
    tokens = jnp.where(is_found, jnp.minimum(tokens, most), 1.0)
    by_model = state.tokens[:, MODEL]
    added = _mean(jnp.maximum(by_model - tokens, 0.0), context.active)
    rate = state.recent_tokens / state.recent_time
    is_model = added > rate * (self.model_cost - 1.0)
    by_lookup = ~is_model | (tokens >= by_model)
    is_model = is_model & jnp.any(context.active & ~by_lookup)
    arm = jnp.where(by_lookup, jnp.where(is_found, arm, -1), MODEL)
    return by_lookup, Choice(arm=arm, is_model=is_model)

  def _drafter_shape(self, shape: tree.TreeShape) -> tree.TreeShape:
    depth = self.drafter_depth or shape.max_depth
    return dataclasses.replace(shape, max_depth=depth)


def _mean(values, active):
  """Mean of [batch] over active rows; 0 for none."""
  rows = jnp.maximum(jnp.sum(active, dtype=jnp.float32), 1.0)
  return jnp.sum(jnp.where(active, values, 0.0)) / rows


def _pad(pool: tree.Pool, size: int) -> tree.Pool:
  """A pool of `size` candidates, the new ones empty."""
  rest = ((0, 0), (0, size - pool.tokens.shape[1]))
  return tree.Pool(
    tokens=jnp.pad(pool.tokens, rest),
    parents=jnp.pad(pool.parents, rest, constant_values=-1),
    scores=jnp.pad(pool.scores, rest, constant_values=tree.EMPTY),
  )
