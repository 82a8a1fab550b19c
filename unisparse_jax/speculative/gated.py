# SPDX-License-Identifier: Apache-2.0
"""A policy that stops drafting where drafting does not pay."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unisparse_jax.speculative import policy as policy_lib

# Steps that a first guess of the mean rate counts for, and that in break-evens.
_PRIOR_STEPS = 4.0
_PRIOR_RATE = 1.5
# Steps that the mean counts for in a row's own rate, unless other rows took
# fewer; and how much slower the last of n is: 1 + (mean - 1) / n**_SPREAD.
_ROW_STEPS = 16.0
_SPREAD = 0.15
_LONGEST = 1024  # plain steps in a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GateState:
  """Attributes:
  inner: state of the wrapped policy.
  tokens: float32 [batch], discounted sum of tokens of drafted steps.
  steps: float32 [batch], discounted number of these steps.
  balance: float32 scalar, plain steps that drafting has saved lately.
  patience: float32 scalar, what it may lose before the gate closes.
  period: int32 scalar, plain steps of the next stretch.
  wait: int32 scalar, plain steps left of this one.
  """

  inner: Any
  tokens: Float[Array, " batch"]
  steps: Float[Array, " batch"]
  balance: Float[Array, ""]
  patience: Float[Array, ""]
  period: Int[Array, ""]
  wait: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(policy_lib.StatelessPolicy):
  """Another policy, with stretches of plain decoding in between.

  A batch is over with its last row, so what counts is how much sooner that one
  ends: each row's own rate says when it would, and the tokens per step of the
  row that would be last stand for the batch. What each drafted step saves, or
  loses, is added up; once that is more than the batch's patience, the next
  `period` steps draft nothing. Many rows tell sooner than one, so the patience
  of a batch is less. Then drafting has `look` to lose before the next stretch,
  twice as long. Only steps that are over are looked at, so the output stays
  that of plain decoding.

  Tried before: a running mean of all rows' tokens against one break-even. It
  took the mean step's cost for that of shallow trees, which a policy chooses
  where drafts are poor, and closed where they paid: at temperature 1 and batch
  1 (H200, 155M) 1.03 to 1.49 times plain decoding where the policy within
  reaches 1.33 to 1.91; at batch 16 and 64 0.91 to 0.95 where no draft pays,
  0.95 to 0.97 now. Then the same sum with two steps' weight for what all rows
  show: of 64 rows one has always had bad luck, and the gate closed, greedily,
  where drafting brought 1.23, 1.36 and 1.52 times (it kept 1.17, 1.18, 1.19).
  With twelve steps' weight and a memory of twenty it closed in two of these
  (1.22 and 1.21 for 1.23 and 1.35).

  Attributes:
    policy: decides whenever a step drafts.
    step_cost: float32 scalar or [num_buckets], time of a drafted step without
      its levels, in plain steps.
    level_cost: float32 scalar, time of a level.
    period: int32 scalar, plain steps in a row.
    patience: float32 scalar, plain steps that one row alone may lose; a batch
      look + (patience - look) / sqrt(batch).
    look: float32 scalar, likewise, after a stretch, of any batch.
    most: float32 scalar, what can have been saved and be lost again.
    decay: float32 scalar in [0, 1), weight of the past in a row's rate.
  """

  policy: Any
  step_cost: Float[Array, "..."] | float
  level_cost: Float[Array, ""] | float = 0.0
  period: Int[Array, ""] | int = 128
  patience: Float[Array, ""] | float = 2.0
  look: Float[Array, ""] | float = 0.5
  most: Float[Array, ""] | float = 8.0
  decay: Float[Array, ""] | float = 0.9

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

  def _patience(self, batch: int) -> Float[Array, ""]:
    look = jnp.asarray(self.look, jnp.float32)
    patience = jnp.asarray(self.patience, jnp.float32)
    return look + (patience - look) * jnp.float32(batch**-0.5)

  def init_state(self, batch: int) -> GateState:
    return GateState(
      inner=self.policy.init_state(batch),
      tokens=jnp.zeros((batch,), jnp.float32),
      steps=jnp.zeros((batch,), jnp.float32),
      balance=jnp.float32(0.0),
      patience=self._patience(batch),
      period=jnp.asarray(self.period, jnp.int32),
      wait=jnp.int32(0),
    )

  def plain_steps(self, state, context):
    if not self.policy.can_skip:
      return state.wait
    inner = self.policy.plain_steps(state.inner, context)
    return jnp.where(state.wait > 0, state.wait, inner)

  def decide(self, state, evidence):
    return self.policy.decide(state.inner, evidence)

  def prune(self, state, draft, decision, context):
    return self.policy.prune(state.inner, draft, decision, context)

  def update(self, state: GateState, outcome: policy_lib.Outcome) -> GateState:
    inner = self.policy.update(state.inner, outcome)

    def number(value):
      return jnp.asarray(value, jnp.float32)

    accepted = jnp.where(outcome.active, outcome.accept_len + 1, 0)
    tokens = number(self.decay) * state.tokens + number(accepted)
    steps = number(self.decay) * state.steps + number(outcome.active)
    costs = jnp.atleast_1d(number(self.step_cost))
    cost = costs[jnp.minimum(outcome.bucket, costs.shape[0] - 1)]
    cost += number(self.level_cost) * number(outcome.draft_levels)

    # Plain decoding takes as many steps as the row with most has tokens left.
    left = number(outcome.remaining)
    prior = number(_PRIOR_STEPS)
    is_left = left > 0
    all_tokens, all_steps = (
      jnp.sum(jnp.where(is_left, x, 0.0)) for x in (tokens, steps)
    )
    mean = number(_PRIOR_RATE) * cost * prior + all_tokens
    mean /= prior + all_steps
    num_left = jnp.maximum(jnp.sum(number(is_left)), number(1.0))
    slow = 1.0 + (mean - 1.0) * num_left ** number(-_SPREAD)
    known = jnp.minimum(prior + all_steps - steps, number(_ROW_STEPS))
    rate = (known * slow + tokens) / (known + steps)
    rate = jnp.where(is_left, rate, 1.0)
    saved = jnp.max(left) / jnp.maximum(jnp.max(left / rate), 1e-6) - cost

    balance = jnp.minimum(state.balance + saved, number(self.most))
    closes = balance < -state.patience
    pays = balance > state.patience
    period = jnp.asarray(self.period, jnp.int32)
    longer = jnp.minimum(2 * state.period, jnp.maximum(period, _LONGEST))
    drafted = GateState(
      inner=inner,
      tokens=tokens,
      steps=steps,
      balance=jnp.where(closes, 0.0, balance),
      patience=jnp.where(
        closes,
        number(self.look),
        jnp.where(pays, self._patience(left.shape[0]), state.patience),
      ),
      period=jnp.where(closes, longer, jnp.where(pays, period, state.period)),
      wait=jnp.where(closes, state.period, 0),
    )
    plain = dataclasses.replace(
      state, inner=inner, wait=jnp.maximum(state.wait - outcome.steps, 0)
    )
    is_drafted = outcome.draft_levels > 0
    return jax.tree.map(
      lambda a, b: jnp.where(is_drafted, a, b), drafted, plain
    )
