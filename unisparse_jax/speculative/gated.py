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
_ROW_STEPS = 12.0
_SPREAD = 0.15
_LONGEST = 1024  # plain steps in a row
# On a drafted step's cost, of which the gate itself is 1 to 2%: near break-even
# a batch that closes late loses more than one that closes early.
_MARGIN = 1.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GateState:
  """Attributes:
  inner: state of the wrapped policy.
  rows: float32 [2, batch], discounted sums over drafted steps: tokens, steps.
  savings: float32 [2]: plain steps that drafting has saved lately, and what it
    may lose before the gate closes.
  stretch: int32 [2]: plain steps of the next one, and those left of this one.

  A few arrays, as each costs a GPU an operation a step and a copy.
  """

  inner: Any
  rows: Float[Array, "2 batch"]
  savings: Float[Array, "2"]
  stretch: Int[Array, "2"]


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
  twice as long. Several rows get no look where less would be left than the
  stretch before it: all of them would have to become easy, and soon (then up to
  35% are lost, against 0.4% won where nothing changes); one stretch takes what
  is left, as each asks the host anew. Only steps that are over count, so the
  output stays that of plain decoding.

  Tried before: a running mean of all rows' tokens against one break-even. It
  took the mean step's cost for that of shallow trees, which a policy chooses
  where drafts are poor, and closed where they paid: at temperature 1 and batch
  1 (H200, 155M) 1.03 to 1.49 times plain decoding where the policy within
  reaches 1.33 to 1.91; at batch 16 and 64 0.91 to 0.95 where no draft pays.
  Then the same sum with two steps' weight for what all rows show: of 64 rows
  one has always had bad luck, and the gate closed, greedily, where drafting
  brought 1.23, 1.36 and 1.52 times (it kept 1.17, 1.18, 1.19). With twelve
  steps' weight and a memory of twenty it closed in two of these (1.22 and 1.21
  for 1.23 and 1.35). With sixteen and a margin of 3% it stayed open for 100 of
  176 steps where drafting brought 0.94 times, and kept 0.91 (batch 16,
  temperature 1, long context). With 10% and twelve steps it kept 0.971 or more
  in 40 places of batch 1 to 64, temperature 0 and 1; but greedy text is poor to
  draft at first and repetitive later: code, docs and long context stay plain at
  batch 16 and 64 where drafting brings 1.01 to 1.64 times. A look where half a
  stretch is left keeps 1.42 of 1.66 in code at batch 16, 0.963 in one place.

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
  look: Float[Array, ""] | float = 0.25
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
      rows=jnp.zeros((2, batch), jnp.float32),
      savings=jnp.stack([jnp.float32(0.0), self._patience(batch)]),
      stretch=jnp.stack([jnp.asarray(self.period, jnp.int32), jnp.int32(0)]),
    )

  def plain_steps(self, state, context):
    wait = state.stretch[1]
    if not self.policy.can_skip:
      return wait
    inner = self.policy.plain_steps(state.inner, context)
    return jnp.where(wait > 0, wait, inner)

  def decide(self, state, evidence):
    return self.policy.decide(state.inner, evidence)

  def prune(self, state, draft, decision, context):
    return self.policy.prune(state.inner, draft, decision, context)

  def update(self, state: GateState, outcome: policy_lib.Outcome) -> GateState:
    inner = self.policy.update(state.inner, outcome)

    def number(value):
      return jnp.asarray(value, jnp.float32)

    new = jnp.where(
      outcome.active,
      jnp.stack([number(outcome.accept_len + 1), jnp.ones_like(state.rows[1])]),
      0.0,
    )
    rows = number(self.decay) * state.rows + new
    costs = jnp.atleast_1d(number(self.step_cost))
    cost = costs[jnp.minimum(outcome.bucket, costs.shape[0] - 1)]
    cost += number(self.level_cost) * number(outcome.draft_levels)
    cost *= number(_MARGIN)

    # Plain decoding takes as many steps as the row with most has tokens left.
    left = number(outcome.remaining)
    saved = jnp.max(left) / jnp.maximum(
      jnp.max(left / _rates(rows, left > 0, cost)), 1e-6
    )
    balance = jnp.minimum(state.savings[0] + saved - cost, number(self.most))
    patience = state.savings[1]
    closes, pays = balance < -patience, balance > patience
    savings = jnp.stack(
      [
        jnp.where(closes, 0.0, balance),
        jnp.where(
          closes,
          number(self.look),
          jnp.where(pays, self._patience(left.shape[0]), patience),
        ),
      ]
    )
    is_drafted = outcome.draft_levels > 0
    return GateState(
      inner=inner,
      rows=jnp.where(is_drafted, rows, state.rows),
      savings=jnp.where(is_drafted, savings, state.savings),
      stretch=self._stretch(
        state.stretch, outcome, is_drafted & closes, is_drafted & pays
      ),
    )

  def _stretch(self, stretch, outcome, closes, pays) -> Int[Array, "2"]:
    following, wait = stretch
    period = jnp.asarray(self.period, jnp.int32)
    longer = jnp.minimum(2 * following, jnp.maximum(period, _LONGEST))
    rest = jnp.where(closes, following, jnp.maximum(wait - outcome.steps, 0))
    following = jnp.where(closes, longer, jnp.where(pays, period, following))
    if outcome.remaining.shape[0] > 1:
      # No look after this stretch: the next begins at once.
      behind = jnp.max(outcome.remaining) - rest
      is_late = (closes | (wait > 0)) & (behind <= following // 2)
      rest += jnp.where(is_late, following, 0)
    return jnp.stack([following, rest])


def _rates(rows, is_left, cost):
  """float32 [batch], tokens that each row will bring per drafted step.

  What all rows show counts for a row that has shown little itself.
  """
  tokens, steps = rows
  all_tokens, all_steps = jnp.sum(jnp.where(is_left[None], rows, 0.0), axis=1)
  prior = jnp.float32(_PRIOR_STEPS)
  mean = (_PRIOR_RATE * cost * prior + all_tokens) / (prior + all_steps)
  num_left = jnp.maximum(jnp.sum(is_left, dtype=jnp.float32), 1.0)
  slow = 1.0 + (mean - 1.0) * num_left ** jnp.float32(-_SPREAD)
  known = jnp.minimum(prior + all_steps - steps, _ROW_STEPS)
  rate = (known * slow + tokens) / (known + steps)
  return jnp.where(is_left, rate, 1.0)
