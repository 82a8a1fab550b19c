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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from unisparse_jax import models
from unisparse_jax.models import sampling
from unisparse_jax.speculative import (
  plain_steps,
  statistics,
  tree,
  verification,
  verify_step,
)
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative.drafters import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the loop is compiled for.

  Attributes:
    shape: sizes of trees.
    sampler: how the target's tokens are drawn.
    eos_ids: tokens that end a row.
    capacity: slots of the target's cache.
    slack: more slots that the token buffer and the drafter have.
    max_steps: entries of the log.
    log_trees: whether the log keeps the trees.
    chunk: tokens per pass of the target over the prompt, or None for all.
  """

  shape: tree.TreeShape
  sampler: sampling.Sampler
  eos_ids: tuple[int, ...]
  capacity: int
  slack: int
  max_steps: int
  log_trees: bool
  chunk: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
  """Everything that a step changes.

  Attributes:
    tokens: int32 [batch, slots], prompt and emitted tokens; slots are
      `Settings.capacity` and `slack`.
    lengths: int32 [batch], known tokens, root included.
    limits: int32 [batch], known tokens at which a row ends.
    done: bool [batch].
    keys: [batch] typed keys, or None for a sampler without noise.
    reference: int32 [batch, slots], by absolute position the token that a
      row is taken to write, -1 for what it draws; or None for no such text.
    cache: of the target; lengths - 1 tokens a row.
    drafter_state: of the drafter.
    policy_state: of the policy.
    log: what happened.
  """

  tokens: Int[Array, "batch slots"]
  lengths: Int[Array, " batch"]
  limits: Int[Array, " batch"]
  done: Bool[Array, " batch"]
  keys: Any
  reference: Int[Array, "batch slots"] | None
  cache: models.TreeCache
  drafter_state: Any
  policy_state: Any
  log: statistics.StepLog


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")
def decode(
  flat_target: models.Flat[models.Decoder],
  flat_drafter: models.Flat[base.Drafter],
  policy: policy_lib.Policy,
  state: DecodeState,
  num_steps: Int[Array, ""],
  *,
  settings: Settings,
) -> DecodeState:
  """Steps until every row is done, or `num_steps` more were taken.

  Args:
    flat_target: the model whose output is produced.
    flat_drafter: proposes tokens.
    policy: sizes the trees.
    state: donated.
    num_steps: int32 scalar; data, so its value does not compile anew.
    settings: static.

  Returns:
    The state.
  """
  target, drafter = flat_target.module, flat_drafter.module
  last_step = state.log.num_steps + num_steps
  last_step = jnp.minimum(last_step, settings.max_steps)

  def is_running(state):
    return jnp.any(~state.done) & (state.log.num_steps < last_step)

  def step(state):
    return _step(target, drafter, policy, state, settings)

  def plain_stretch(state, wanted):
    steps_left = jnp.maximum(last_step - state.log.num_steps, 0)
    return plain_steps.stretch(
      target,
      drafter,
      policy,
      state,
      jnp.minimum(wanted, steps_left),
      eos_ids=settings.eos_ids,
      shape=settings.shape,
      sampler=settings.sampler,
      taps=taps_of(target, drafter),
    )

  if policy.declines:
    return lax.while_loop(
      is_running, lambda state: plain_stretch(state, last_step), state
    )
  if not policy.can_skip:
    return lax.while_loop(is_running, step, state)

  def wanted(state):
    return policy.plain_steps(state.policy_state, _context(state))

  def body(state):
    # In a stretch of drafting nothing but its own condition is asked.
    state = lax.while_loop(
      lambda state: is_running(state) & (wanted(state) == 0), step, state
    )
    return plain_stretch(state, wanted(state))

  return lax.while_loop(is_running, body, state)


def room_behind(shape: tree.TreeShape) -> int:
  """Slots past the last token that a step, or the drafter, may write.

  At least two: no row's own token lies in the last slot of the target's cache,
  where `plain_steps` leave what they write past the end.
  """
  return shape.max_depth + 1


def slack_behind(policy: policy_lib.Policy) -> int:
  """Slots more that a stretch of plain steps writes in one go, at its end.

  Not in the target's cache: each slot of it may cost the attention of every
  step.
  """
  return plain_steps.MAX_STEPS if policy.can_skip or policy.declines else 0


def _context(state: DecodeState) -> base.Context:
  return base.Context(
    tokens=state.tokens,
    lengths=state.lengths,
    active=~state.done,
    step=state.log.num_steps,
    keys=state.keys,
  )


def _step(target, drafter, policy, state: DecodeState, settings: Settings):
  shape = settings.shape
  active = ~state.done
  context = _context(state)
  draft = drafter.draft(
    target,
    state.drafter_state,
    context,
    shape=shape,
    policy=policy,
    policy_state=state.policy_state,
  )
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
  bucket, num_nodes, result = verify_step.verify(
    target,
    nodes_tree,
    num_nodes,
    active,
    state.cache,
    state.lengths,
    state.limits,
    state.keys,
    state.reference,
    shape=shape,
    sampler=settings.sampler,
    taps=taps_of(target, drafter),
    probabilities=draft.probabilities,
  )
  acceptance, keys_new, values_new, taps = result

  # Cut at the limit and after the first end token.
  emitted = acceptance.tokens
  count = jnp.minimum(acceptance.accept_len + 1, state.limits - state.lengths)
  count, ended = verification.until_end(
    emitted, jnp.where(active, count, 0), settings.eos_ids
  )
  lengths = state.lengths + count
  done = state.done | ended | (lengths >= state.limits)

  committed = base.Committed(
    tokens=jnp.take_along_axis(nodes_tree.tokens, acceptance.path, axis=1),
    next_tokens=emitted,
    start=state.lengths - 1,
    counts=count,
    taps=taps,
    record=draft.record,
  )
  outcome = policy_lib.Outcome(
    decision=draft.decision,
    evidence_entropy=draft.entropy,
    accept_len=acceptance.accept_len,
    num_emitted=count,
    bucket=bucket,
    draft_levels=draft.levels,
    active=active,
    remaining=jnp.where(done, 0, state.limits - lengths),
    steps=jnp.int32(1),
  )
  return DecodeState(
    tokens=tree.write_rows(state.tokens, emitted, state.lengths),
    lengths=lengths,
    limits=state.limits,
    done=done,
    keys=state.keys,
    reference=state.reference,
    cache=state.cache.append(
      keys_new, values_new, count, num_slots=shape.max_depth + 1
    ),
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
      bucket_size=verify_step.sizes(shape)[bucket],
      path=acceptance.path,
      score=draft.score,
    ),
  )


def taps_of(target: models.Decoder, drafter: base.Drafter) -> tuple[int, ...]:
  """Layers of the target whose input the drafter reads."""
  if not drafter.needs_taps:
    return ()
  own = getattr(drafter, "tap_layers", None)
  if own is not None:
    return tuple(own)
  return models.tap_layers(target.config.num_layers)
