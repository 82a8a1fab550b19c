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
  """

  reference: Any
  shifts: Any
  vocab_size: int = dataclasses.field(metadata=dict(static=True))
  needs_taps = False

  def check(self, target, shape):
    del target, shape

  def init(self, target, *, batch, capacity):
    del target, capacity
    return jnp.zeros((batch,), jnp.int32)  # counts committed tokens

  def extend(self, target, state, committed, *, is_prefill, attention_fn):
    del target, is_prefill, attention_fn
    return state + committed.counts

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
