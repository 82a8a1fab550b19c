# SPDX-License-Identifier: Apache-2.0
"""Draft, verify and commit until every row is done: one compiled loop.

Only decisions travel between the parts. The target's cache is read in the
branches of the switch over verification sizes and written once after it, by at
most max_depth + 1 slots a row. The root, the last known token, is never in the
cache: a step stores it with the accepted nodes and emits one token for each.

Source: the loop of EAGLE-2 (Li et al., 2024) and HeteroSpec v1 (Liu et al.,
2025). Differs from them in: batches with their own accepted lengths, static
shapes, and no compaction of the cache.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from unisparse_jax import models
from unisparse_jax.models import kv_cache, sampling
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import statistics, tree, verification
from unisparse_jax.speculative.drafters import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the loop is compiled for.

  Attributes:
    shape: sizes of trees.
    sampler: how the target's tokens are drawn.
    eos_ids: tokens that end a row.
    capacity: slots of the target's cache and of the token buffer.
    max_steps: entries of the log.
    log_trees: whether the log keeps the trees.
  """

  shape: tree.TreeShape
  sampler: sampling.Sampler
  eos_ids: tuple[int, ...]
  capacity: int
  max_steps: int
  log_trees: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
  """Everything that a step changes.

  Attributes:
    tokens: int32 [batch, capacity], prompt and emitted tokens.
    lengths: int32 [batch], known tokens, root included.
    limits: int32 [batch], known tokens at which a row ends.
    done: bool [batch].
    keys: [batch] typed keys, or None for a sampler without noise.
    cache: of the target; lengths - 1 tokens a row.
    drafter_state: of the drafter.
    policy_state: of the policy.
    log: what happened.
  """

  tokens: Int[Array, "batch capacity"]
  lengths: Int[Array, " batch"]
  limits: Int[Array, " batch"]
  done: Bool[Array, " batch"]
  keys: Any
  cache: models.TreeCache
  drafter_state: Any
  policy_state: Any
  log: statistics.StepLog


@functools.partial(jax.jit, static_argnames=("attention_fn", "settings"))
def prefill(
  target: models.Decoder,
  drafter: base.Drafter,
  policy: policy_lib.Policy,
  tokens: Int[Array, "batch q_len"],
  lengths: Int[Array, " batch"],
  limits: Int[Array, " batch"],
  keys: Any,
  *,
  attention_fn: Any,
  settings: Settings,
) -> DecodeState:
  """Runs the prompts through target and drafter and draws the first token.

  Args:
    target: the model whose output is produced.
    drafter: proposes tokens.
    policy: sizes the trees.
    tokens: int32 [batch, q_len], right-padded.
    lengths: int32 [batch], valid tokens.
    limits: int32 [batch], see `DecodeState`.
    keys: see `DecodeState`.
    attention_fn: how target and drafter attend in the prompt.
    settings: static.

  Returns:
    The state after one token a row.
  """
  batch, q_len = tokens.shape
  shape = settings.shape
  cache = kv_cache.KVCache.init(
    target.config, batch=batch, capacity=settings.capacity, dtype=target.dtype
  )
  hidden, cache, taps = target.hidden_states_and_taps(
    tokens,
    taps=_taps(target, drafter),
    cache=cache,
    attention_fn=attention_fn,
    lengths=lengths,
    cache_is_empty=True,
  )
  assert cache is not None, "a model that is given a cache returns one"
  last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
  noise = None
  if keys is not None:
    noise = sampling.noise_at(keys, lengths, target.config.vocab_size)
  first = sampling.draw_with_noise(
    settings.sampler, target.logits(last[:, 0]), noise
  )
  buffer = jnp.pad(tokens, ((0, 0), (0, settings.capacity - q_len)))
  buffer = _write_rows(buffer, first[:, None], lengths)
  committed = base.Committed(
    tokens=tokens,
    next_tokens=buffer[:, 1 : q_len + 1],
    start=jnp.zeros((batch,), jnp.int32),
    counts=lengths,
    taps=taps,
  )
  drafter_state = drafter.extend(
    target,
    drafter.init(target, batch=batch, capacity=settings.capacity),
    committed,
    is_prefill=True,
    attention_fn=attention_fn,
  )
  lengths = lengths + 1
  return DecodeState(
    tokens=buffer,
    lengths=lengths,
    limits=limits,
    done=_is_any(first, settings.eos_ids) | (lengths >= limits),
    keys=keys,
    cache=models.TreeCache.from_cache(cache),
    drafter_state=drafter_state,
    policy_state=policy.init_state(batch),
    log=statistics.StepLog.init(
      max_steps=settings.max_steps,
      batch=batch,
      max_nodes=shape.max_nodes,
      max_depth=shape.max_depth,
      with_trees=settings.log_trees,
      is_packed=bool(shape.packed),
    ),
  )


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")
def decode(
  target: models.Decoder,
  drafter: base.Drafter,
  policy: policy_lib.Policy,
  state: DecodeState,
  num_steps: Int[Array, ""],
  *,
  settings: Settings,
) -> DecodeState:
  """Steps until every row is done, or `num_steps` more were taken.

  Args:
    target: see `prefill`.
    drafter: see `prefill`.
    policy: see `prefill`.
    state: donated.
    num_steps: int32 scalar; data, so its value does not compile anew.
    settings: static.

  Returns:
    The state.
  """
  last_step = state.log.num_steps + num_steps
  last_step = jnp.minimum(last_step, settings.max_steps)

  def is_running(state):
    return jnp.any(~state.done) & (state.log.num_steps < last_step)

  return lax.while_loop(
    is_running,
    lambda state: _step(target, drafter, policy, state, settings),
    state,
  )


def _step(target, drafter, policy, state: DecodeState, settings: Settings):
  shape = settings.shape
  active = ~state.done
  context = base.Context(
    tokens=state.tokens,
    lengths=state.lengths,
    active=active,
    step=state.log.num_steps,
  )
  draft = _draft(target, drafter, policy, state, context, shape)
  nodes_tree = tree.build(
    context.root_tokens,
    draft.pool,
    max_nodes=shape.max_nodes,
    max_depth=shape.max_depth,
  )
  wanted = policy.prune(state.policy_state, nodes_tree, draft.decision, context)
  available = jnp.sum(nodes_tree.valid, axis=-1, dtype=jnp.int32)
  num_nodes = jnp.clip(wanted + 1, 1, available)
  num_nodes = jnp.where(active, num_nodes, 1)
  bucket, num_nodes, result = _verify(
    target, drafter, nodes_tree, num_nodes, state, settings
  )
  acceptance, keys_new, values_new, taps = result

  # Cut at the limit and after the first end token.
  emitted = acceptance.tokens
  index = jnp.arange(shape.max_depth + 1, dtype=jnp.int32)[None, :]
  count = jnp.minimum(acceptance.accept_len + 1, state.limits - state.lengths)
  is_end = _is_any(emitted, settings.eos_ids)
  end = jnp.where(is_end, index, shape.max_depth + 1)
  count = jnp.minimum(count, jnp.min(end, axis=-1) + 1)
  count = jnp.where(active, count, 0)
  ended = jnp.any(is_end & (index < count[:, None]), axis=-1)
  lengths = state.lengths + count

  committed = base.Committed(
    tokens=jnp.take_along_axis(nodes_tree.tokens, acceptance.path, axis=1),
    next_tokens=emitted,
    start=state.lengths - 1,
    counts=count,
    taps=taps,
  )
  outcome = policy_lib.Outcome(
    decision=draft.decision,
    evidence_entropy=draft.entropy,
    accept_len=acceptance.accept_len,
    num_emitted=count,
    bucket=bucket,
    draft_levels=draft.levels,
    active=active,
  )
  return DecodeState(
    tokens=_write_rows(state.tokens, emitted, state.lengths),
    lengths=lengths,
    limits=state.limits,
    done=state.done | ended | (lengths >= state.limits),
    keys=state.keys,
    cache=state.cache.append(keys_new, values_new, count),
    drafter_state=drafter.extend(
      target,
      state.drafter_state,
      committed,
      is_prefill=False,
      attention_fn=None,
    ),
    policy_state=policy.update(state.policy_state, outcome),
    log=state.log.append(
      outcome,
      draft=nodes_tree,
      num_nodes=num_nodes,
      bucket_size=_sizes(shape)[bucket],
      path=acceptance.path,
      score=draft.score,
    ),
  )


def _draft(target, drafter, policy, state, context, shape) -> base.Draft:
  def run():
    return drafter.draft(
      target,
      state.drafter_state,
      context,
      shape=shape,
      policy=policy,
      policy_state=state.policy_state,
    )

  wanted = policy.should_draft(state.policy_state, context)
  if wanted is None:
    return run()
  like = jax.eval_shape(run)
  return lax.cond(wanted, run, lambda: _no_draft(like))


def _no_draft(like: base.Draft) -> base.Draft:
  """A draft of the same shapes that holds no candidate."""
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  empty = jnp.full_like(zeros.pool.scores, tree.EMPTY)
  pool = dataclasses.replace(
    zeros.pool, parents=zeros.pool.parents - 1, scores=empty
  )
  return dataclasses.replace(zeros, pool=pool)


def _sizes(shape: tree.TreeShape) -> Array:
  """int32, the size that each branch of the switch stands for."""
  return jnp.asarray(shape.packed or shape.buckets, jnp.int32)


def _verify(target, drafter, draft, num_nodes, state, settings):
  """Runs the smallest sufficient branch; its index and what it found."""
  shape = settings.shape
  if shape.packed:
    num_nodes = _share(draft, num_nodes, ~state.done, shape.packed[-1])
    total = jnp.sum(num_nodes)
  else:
    total = jnp.max(num_nodes)
  bucket = jnp.searchsorted(_sizes(shape), total).astype(jnp.int32)
  bucket = jnp.minimum(bucket, len(_sizes(shape)) - 1)
  draft = draft.limit(num_nodes)

  def branch(size):
    return lambda *operands: _verify_size(
      target, drafter, size, settings, *operands
    )

  branches = [branch(size) for size in shape.packed or shape.buckets]
  operands = (draft, state.cache, state.lengths, state.keys)
  if len(branches) == 1:
    return bucket, num_nodes, branches[0](*operands)
  return bucket, num_nodes, lax.switch(bucket, branches, *operands)


def _share(draft, num_nodes, active, budget):
  """Nodes per row when the best `budget` nodes of all rows are kept.

  Scores fall along a row, so what is kept of it is a prefix. A finished row
  gets none.
  """
  batch, max_nodes = draft.scores.shape
  if batch * max_nodes <= budget:
    return jnp.where(active, num_nodes, 0)
  index = jnp.arange(max_nodes, dtype=jnp.int32)[None, :]
  usable = (index < num_nodes[:, None]) & active[:, None]
  # A root goes before every draft node, a certain one (score 0) included.
  scores = jnp.where(index == 0, 1.0, draft.scores)
  scores = jnp.where(usable, scores, 2 * tree.EMPTY).reshape(-1)
  top, chosen = lax.top_k(scores, budget)
  row = jnp.where(top > 1.5 * tree.EMPTY, chosen // max_nodes, batch)
  rows = jnp.arange(batch, dtype=jnp.int32)
  return jnp.sum(row[None, :] == rows[:, None], axis=-1, dtype=jnp.int32)


def _verify_size(target, drafter, size, settings, draft, cache, lengths, keys):
  """Verifies with one static size: nodes a row, or in all if packed."""
  shape = settings.shape
  packing = None
  if shape.packed:
    packing = models.Packing.of(draft.valid, size)
  else:
    draft = draft.prefix(size)
  # [batch, num_nodes]
  positions = lengths[:, None] - 1 + draft.depths
  out = models.tree_forward(
    target,
    draft.tokens,
    positions,
    draft.ancestors,
    cache,
    taps=_taps(target, drafter),
    packing=packing,
  )
  logits = target.logits(out.hidden)
  noise = None
  if keys is not None:
    noise = _node_noise(draft, lengths, keys, shape, logits.shape[-1], packing)
  targets = sampling.draw_with_noise(settings.sampler, logits, noise)
  if packing is not None:
    targets = packing.unpack(targets)
  acceptance = verification.accept_matches(
    draft, targets, max_depth=shape.max_depth
  )

  def on_path(values):
    index = acceptance.path.reshape(
      *acceptance.path.shape, *(1,) * (values.ndim - 2)
    )
    return jnp.take_along_axis(values, index, axis=1)

  taps = None if out.taps is None else on_path(out.taps)
  k, v = tuple(map(on_path, out.k)), tuple(map(on_path, out.v))
  return acceptance, k, v, taps


def _node_noise(draft, lengths, keys, shape, vocab_size, packing):
  """Noise of every node's next token: drawn per depth, not per node."""
  levels = min(shape.max_depth, draft.tokens.shape[1] - 1) + 1
  depth = jnp.arange(levels, dtype=jnp.int32)
  # A node of depth d sits at lengths - 1 + d; its next token one further.
  noise = sampling.noise_at(keys, lengths[:, None] + depth[None], vocab_size)
  if packing is None:
    return jnp.take_along_axis(noise, draft.depths[:, :, None], axis=1)
  rows = packing.flat // draft.tokens.shape[1]
  depths = draft.depths.reshape(-1)[packing.flat]
  return noise[rows, depths][None]


def _taps(target, drafter) -> tuple[int, ...]:
  if not drafter.needs_taps:
    return ()
  return models.tap_layers(target.config.num_layers)


def _is_any(tokens, eos_ids: tuple[int, ...]):
  found = [tokens == eos_id for eos_id in eos_ids]
  return functools.reduce(operator.or_, found, jnp.zeros(tokens.shape, bool))


def _write_rows(buffer, values, starts):
  """Writes values[b] at buffer[b, starts[b]:]."""
  if buffer.shape[0] == 1:
    return lax.dynamic_update_slice(buffer, values, (0, starts[0]))
  return jax.vmap(
    lambda row, new, start: lax.dynamic_update_slice(row, new, (start,))
  )(buffer, values, starts)
