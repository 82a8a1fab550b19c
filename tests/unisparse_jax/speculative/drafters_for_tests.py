# SPDX-License-Identifier: Apache-2.0
"""Drafters whose accuracy a test chooses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree
from unisparse_jax.speculative.drafters import base, by_level


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceDrafter:
  """Drafts the known output, shifted; two siblings hang on every node of it.

  Attributes:
    reference: int32 [batch, num_tokens], by absolute position.
    shifts: int32, as reference, added to the drafted token. 0: a perfect
      drafter; with all at 5, no draft token is ever right.
    vocab_size: tokens wrap around it.
    needs_taps: then the state keeps the target's taps by position.
  """

  reference: Any
  shifts: Any
  vocab_size: int = dataclasses.field(metadata=dict(static=True))
  needs_taps: bool = dataclasses.field(
    default=False, metadata=dict(static=True)
  )

  def check(self, target, shape):
    del target, shape

  def init(self, target, *, batch, capacity):
    # Committed tokens are counted, and their taps kept.
    width = 3 * target.config.embed_dim if self.needs_taps else 0
    return jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, capacity, width))

  def extend(self, target, state, committed, *, is_prefill, attention_fn):
    del target, is_prefill, attention_fn
    counts, kept = state
    if self.needs_taps:
      index = jnp.arange(committed.tokens.shape[1])[None, :]
      slots = committed.start[:, None] + index
      slots = jnp.where(index < committed.counts[:, None], slots, -1)
      slots = jnp.where(slots < 0, kept.shape[1], slots)
      rows = jnp.arange(kept.shape[0])[:, None]
      kept = kept.at[rows, slots].set(committed.taps, mode="drop")
    return counts + committed.counts, kept

  def draft(self, target, state, context, *, shape, policy, policy_state):
    del target, state
    batch, depth, width = context.lengths.shape[0], shape.max_depth, 3
    step = jnp.arange(depth, dtype=jnp.int32)
    index = context.lengths[:, None] + step[None, :]

    def at(values):
      return jnp.take_along_axis(values, index, axis=1, mode="clip")

    chain = at(self.reference) + at(self.shifts)
    sibling = jnp.arange(width, dtype=jnp.int32)
    tokens = (chain[:, :, None] + sibling[None, None, :]) % self.vocab_size
    above = jnp.where(step > 0, (step - 1) * width, -1)
    parents = jnp.broadcast_to(above[None, :, None], tokens.shape)
    scores = -0.1 * (step[:, None] + 1).astype(jnp.float32)
    scores = scores - 0.5 * sibling[None, :].astype(jnp.float32)
    entropy = (context.lengths % 8).astype(jnp.float32)
    pool = tree.Pool(
      tokens=tokens.reshape(batch, -1),
      parents=parents.reshape(batch, -1),
      scores=jnp.broadcast_to(scores.reshape(1, -1), (batch, depth * width)),
    )
    decision = policy.decide(
      policy_state,
      policy_lib.Evidence(
        entropy=entropy,
        score=jnp.zeros((batch,), jnp.float32),
        frontier_tokens=chain[:, shape.base_depth - 1 : shape.base_depth],
        frontier_pool_index=jnp.full(
          (batch, 1), (shape.base_depth - 1) * width, jnp.int32
        ),
        pool=pool,
        lengths=context.lengths,
      ),
    )
    levels = jnp.repeat(step + 1, width, total_repeat_length=depth * width)
    too_deep = levels[None, :] > decision.depth[:, None]
    pool = dataclasses.replace(
      pool, scores=jnp.where(too_deep, tree.EMPTY, pool.scores)
    )
    return base.Draft(
      pool=pool,
      decision=decision,
      entropy=entropy,
      score=jnp.zeros((batch,), jnp.float32),
      levels=jnp.int32(depth),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TableDrafter(by_level.LevelDrafter):
  """Logits that depend on the last token alone.

  Attributes:
    table: float32 [vocab_size, vocab_size].
  """

  table: Any
  needs_taps = False

  def check(self, target, shape):
    del target, shape

  def init(self, target, *, batch, capacity):
    del target, batch, capacity
    return ()

  def extend(self, target, state, committed, *, is_prefill, attention_fn):
    del target, committed, is_prefill, attention_fn
    return state

  def start(self, target, state, context, shape):
    logits = self.table[context.root_tokens]
    return *base.top_children(logits, shape.width), ()

  def grow(self, target, state, scratch, frontier, shape):
    logits = self.table[frontier.tokens]
    return *base.top_children(logits, shape.width), scratch
