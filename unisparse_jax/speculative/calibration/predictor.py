# SPDX-License-Identifier: Apache-2.0
"""Fits `adaptive.Predictive` to a replay, and judges it on other requests.

Tried on 4,823 logged steps of the shipped decoder with a weak head (1.58 tokens
a step), 120 requests of five domains at temperature 0 and 1, three splits with
24 requests held out, and verification of 32 nodes at 1.12 or 2.4 times the cost
of one. Tokens per millisecond against the table searched by bin: this linear
prediction +0.3% to +1.5%; without the request's record -0.1% to +2.4% (worse
with cheap verification, better with dear one); boosted trees on the same inputs
-0.6% to +2.2%, below the linear one in five cases of six; the bandit, on one
split, -0.4% to -0.6%. Hindsight would be 6% to 20% above the table.

Not verifying nodes whose path the drafter gives less than 0.3%, 1% or 3% (155M
target, greedy, batch 1, float32, ten prompts of 96 tokens): 6%, 28% and 64%
fewer verified a token, 1.4%, 4.3% and 13% more calls. A call costs the same
with 64 nodes as with fewer, so it was left out.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from unisparse_jax.speculative import adaptive, gated
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative.calibration import artefact as artefact_lib
from unisparse_jax.speculative.calibration import costs as costs_lib
from unisparse_jax.speculative.calibration import replay, search

KEEP = 0.7  # of the record of a request; 0.5 and 0.9 lie within 0.8%
_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
  """A linear prediction of the tokens of every arm.

  Attributes:
    weights: float64 [NUM_FEATURES, num_arms].
    thresholds: [7].
    prior: accepted tokens that a request starts from.
    keep: weight of the record against the last step.
    use_recent: whether the record is looked at; without it the prediction is of
      the draft alone.
  """

  weights: np.ndarray
  thresholds: np.ndarray
  prior: float
  keep: float = KEEP
  use_recent: bool = True

  def inputs(self, records: replay.StepRecords) -> np.ndarray:
    """[n, NUM_FEATURES] of logged steps, the record of each as it was then."""
    recent = recent_accepted(records, self.prior, self.keep)
    if not self.use_recent:
      recent = np.full_like(recent, self.prior)
    return adaptive.features(
      records.entropy.astype(np.float32),
      records.score.astype(np.float32),
      recent.astype(np.float32),
      np.asarray(self.thresholds, np.float32),
      xp=np,
    )

  def tokens(self, records: replay.StepRecords) -> np.ndarray:
    """[n, num_arms], predicted."""
    return self.inputs(records) @ self.weights

  def within(
    self, arms: search.Arms, costs: costs_lib.StepCosts
  ) -> "Predictor":
    """What the arms bring in such a batch, see `search.Arms.within`."""
    weights = np.asarray(self.weights)[:, arms.served(costs)]
    # One of the bins' features is 1.
    is_bin = np.arange(len(weights)) < policy_lib.NUM_BINS
    weights = weights + is_bin[:, None] * arms.preference(costs)
    return dataclasses.replace(self, weights=weights)

  def choose(
    self, records: replay.StepRecords, times: np.ndarray, rate: float
  ) -> np.ndarray:
    """int [n], the arm that the policy takes where it is alone in its batch."""
    return np.argmax(self.tokens(records) - rate * times[None, :], axis=1)

  def rate(
    self, records: replay.StepRecords, arms: search.Arms, times: np.ndarray
  ) -> float:
    """Tokens per millisecond that its own choices reach, by Dinkelbach."""
    rate = float(np.max(arms.tokens.mean(axis=0) / times))
    for _ in range(20):
      picked = self.choose(records, times, rate)
      tokens = np.take_along_axis(arms.tokens, picked[:, None], 1).mean()
      new = float(tokens / times[picked].mean())
      if abs(new - rate) <= 1e-6 * rate:
        break
      rate = new
    return rate

  def policy(
    self,
    arms: search.Arms,
    costs: costs_lib.StepCosts,
    *,
    rate: float,
    width: int,
    drafter_hash: str | None,
    shared: bool = True,
  ) -> adaptive.Predictive:
    """The policy for batches like those of `costs`."""
    return adaptive.Predictive(
      weights=jnp.asarray(self.weights, jnp.float32),
      thresholds=jnp.asarray(self.thresholds, jnp.float32),
      depth=jnp.asarray([d for d, _ in arms.arms], jnp.int32),
      nodes=jnp.asarray([n for _, n in arms.arms], jnp.int32),
      times=jnp.asarray(arms.times(costs), jnp.float32),
      rate=jnp.float32(rate),
      prior=jnp.float32(self.prior),
      keep=jnp.float32(self.keep if self.use_recent else 1.0),
      base_depth=arms.base_depth,
      width=width,
      shared=shared,
      drafter_hash=drafter_hash,
    )


def fit(
  records: replay.StepRecords,
  arms: search.Arms,
  thresholds: np.ndarray,
  *,
  use_recent: bool = True,
  keep: float = KEEP,
) -> Predictor:
  """Ridge regression of each arm's tokens.

  Args:
    records: steps to fit to, in order within each request.
    arms: of these steps.
    thresholds: of the bins.
    use_recent: see `Predictor`.
    keep: see `Predictor`.
  """
  blank = Predictor(
    weights=np.zeros((adaptive.NUM_FEATURES, len(arms.arms))),
    thresholds=np.asarray(thresholds),
    prior=float(records.accept_len.mean()),
    keep=keep,
    use_recent=use_recent,
  )
  x = blank.inputs(records).astype(np.float64)
  gram = x.T @ x / len(x) + _RIDGE * np.eye(x.shape[1])
  weights = np.linalg.solve(gram, x.T @ arms.tokens.astype(np.float64) / len(x))
  return dataclasses.replace(blank, weights=weights)


def recent_accepted(
  records: replay.StepRecords, prior: float, keep: float
) -> np.ndarray:
  """float64 [n], the discounted mean of accepted tokens before each step."""
  result = np.empty(len(records))
  order = np.lexsort((records.order, records.request))
  request, value = None, prior
  for i in order:
    if records.request[i] != request:
      request, value = records.request[i], prior
    result[i] = value
    value = keep * value + (1.0 - keep) * records.accept_len[i]
  return result


def bandit_choices(
  records: replay.StepRecords,
  arms: search.Arms,
  bins: np.ndarray,
  times: np.ndarray,
  *,
  start: np.ndarray,
  rate: float,
  strength: float = 30.0,
  keep: float = 0.98,
) -> np.ndarray:
  """Arms of a bandit that learns each request's own bins from what it played.

  Discounted means of tokens by bin and arm, beginning at the calibrated ones
  with the weight of `strength` steps.

  Args:
    records: steps, in order within each request.
    arms: of these steps.
    bins: of each step.
    times: milliseconds of each arm.
    start: [num_bins, num_arms], calibrated means.
    rate: tokens per millisecond that time is worth.
    strength: steps that the calibration counts for.
    keep: discount of what was seen.

  Returns:
    int [n].
  """
  picked = np.zeros(len(records), np.int64)
  order = np.lexsort((records.order, records.request))
  request, sums, counts = None, start, np.zeros_like(start)
  for i in order:
    if records.request[i] != request:
      request = records.request[i]
      sums, counts = start * strength, np.full_like(start, strength)
    b = bins[i]
    arm = int(np.argmax(sums[b] / counts[b] - rate * times))
    picked[i] = arm
    sums, counts = sums * keep, counts * keep
    sums[b, arm] += arms.tokens[i, arm]
    counts[b, arm] += 1.0
  return picked


def from_artefact(
  artefact: artefact_lib.Artefact, *, batch: int, gate: bool
) -> policy_lib.Policy:
  """The predictive policy that a calibration stored.

  Args:
    artefact: with a predictor in `about`.
    batch: rows that are decoded together.
    gate: stop drafting where plain decoding is faster.
  """
  stored = artefact.about["predictor"]
  costs = artefact.cost(batch)
  arms = search.Arms(
    arms=tuple((int(d), int(n)) for d, n in stored["arms"]),
    tokens=np.zeros((0, len(stored["arms"])), np.float32),
    base_depth=artefact.base_depth,
  )
  model = Predictor(
    weights=np.asarray(stored["weights"]),
    thresholds=np.asarray(artefact.thresholds),
    prior=float(stored["prior"]),
    keep=float(stored["keep"]),
  )
  inner = model.within(arms, costs).policy(
    arms,
    costs,
    rate=float(stored["rates"][str(costs.batch)]),
    width=artefact.width,
    drafter_hash=artefact.drafter_hash,
  )
  if not gate:
    return inner
  plain_ms = costs.plain_ms
  step_ms = costs.fixed_ms + np.asarray(costs.verify_ms)
  return gated.Gated(
    policy=inner,
    step_cost=jnp.asarray(step_ms / plain_ms, jnp.float32),
    level_cost=jnp.float32(costs.draft_ms / plain_ms),
  )
