# SPDX-License-Identifier: Apache-2.0
"""A policy that stops drafting where drafting does not pay."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unisparse_jax.speculative import policy as policy_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GateState:
  """Attributes:
  inner: state of the wrapped policy.
  tokens: float32 scalar, running mean of tokens per drafted step and row.
  wait: int32 scalar, plain steps left.
  """

  inner: Any
  tokens: Float[Array, ""]
  wait: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(policy_lib.StatelessPolicy):
  """Another policy, with stretches of plain decoding in between.

  Whenever the running mean of tokens per step falls below break-even, the next
  `period` steps draft nothing; then one step probes. It looks only at steps
  that are over, so the output stays that of plain decoding.

  Attributes:
    policy: decides whenever a step drafts.
    min_tokens: float32 scalar, tokens per step at which a drafted step costs as
      much as plain decoding: its measured time over that of a plain step.
    period: int32 scalar, plain steps in a row.
    decay: float32 scalar in [0, 1), weight of the past in the running mean.
  """

  policy: Any
  min_tokens: Float[Array, ""] | float
  period: Int[Array, ""] | int = 16
  decay: Float[Array, ""] | float = 0.8

  can_skip = True

  @property
  def declines(self):
    return self.policy.declines

  @property
  def path_choice(self):
    return self.policy.path_choice

  @property
  def drafter_hash(self):
    return self.policy.drafter_hash

  def check(self, shape):
    self.policy.check(shape)

  def init_state(self, batch: int) -> GateState:
    # Begins in favour of drafting.
    return GateState(
      inner=self.policy.init_state(batch),
      tokens=2.0 * jnp.asarray(self.min_tokens, jnp.float32),
      wait=jnp.int32(0),
    )

  def should_draft(self, state, context):
    is_open = state.wait <= 0
    if not self.policy.can_skip:
      return is_open
    return is_open & self.policy.should_draft(state.inner, context)

  def decide(self, state, evidence):
    return self.policy.decide(state.inner, evidence)

  def prune(self, state, draft, decision, context):
    return self.policy.prune(state.inner, draft, decision, context)

  def update(self, state, outcome):
    drafted = outcome.draft_levels > 0
    rows = jnp.maximum(jnp.sum(outcome.active, dtype=jnp.int32), 1)
    tokens = jnp.sum(
      jnp.where(outcome.active, outcome.accept_len + 1, 0), dtype=jnp.int32
    )
    mean = tokens.astype(jnp.float32) / rows.astype(jnp.float32)
    decay = jnp.asarray(self.decay, jnp.float32)
    moved = decay * state.tokens + (1.0 - decay) * mean
    running = jnp.where(drafted, moved, state.tokens)
    closes = drafted & (running < jnp.asarray(self.min_tokens, jnp.float32))
    wait = jnp.where(
      closes, jnp.asarray(self.period, jnp.int32), state.wait - 1
    )
    return GateState(
      inner=self.policy.update(state.inner, outcome),
      tokens=running,
      wait=jnp.maximum(wait, 0),
    )
