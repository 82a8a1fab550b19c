# SPDX-License-Identifier: Apache-2.0
"""A policy that predicts acceptance, instead of HeteroSpec's bins.

It predicts the tokens that each depth and size would bring, from the draft's
entropy and score and from how the request's last steps went, and takes the one
with the best tokens minus rate * time. `gated.Gated` beside it stops drafting
where none pays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree

NUM_FEATURES = policy_lib.NUM_BINS + 7


def features(
  entropy: Float[Array, " n"],
  score: Float[Array, " n"],
  recent: Float[Array, " n"],
  thresholds: Float[Array, "7"],
  xp: Any = jnp,
) -> Float[Array, "n features"]:
  """What the tokens of a step are predicted from, linearly.

  Args:
    entropy: of `policy.Evidence`.
    score: of `policy.Evidence`.
    recent: mean accepted tokens of the request's last steps.
    thresholds: of HeteroSpec's bins, each of which has its own constant.
    xp: jax.numpy or numpy.

  Returns:
    float32 [n, NUM_FEATURES].
  """
  wide = xp.float32
  index = xp.sum(entropy[:, None] > thresholds[None, :], axis=1)
  bins = xp.arange(policy_lib.NUM_BINS)
  one_hot = (index[:, None] == bins[None, :]).astype(wide)
  h = xp.log1p(entropy).astype(wide)
  p = xp.exp(xp.maximum(score, wide(-60.0))).astype(wide)
  r = recent.astype(wide)
  rest = xp.stack(
    [h, p, xp.sqrt(p), r, r * r * wide(0.1), r * p, r * h], axis=1
  )
  return xp.concatenate([one_hot, rest], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecentState:
  """What the loop carries.

  Attributes:
    recent: float32 [batch], discounted mean of accepted tokens.
    weight: float32 [batch], tokens that a row has left, of the most that one
      has: a batch is over with its last row. 0 for a finished one.
  """

  recent: Float[Array, " batch"]
  weight: Float[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictive(policy_lib.StatelessPolicy):
  """The arm with the most predicted tokens for its time.

  Attributes:
    weights: float32 [NUM_FEATURES, num_arms], tokens of each arm from
      `features`.
    thresholds: float32 [7].
    depth: int32 [num_arms], levels.
    nodes: int32 [num_arms], draft nodes, root not counted.
    times: float32 [num_arms], milliseconds of a step of the batch.
    rate: float32 scalar, tokens per millisecond of a row that time is worth.
    prior: float32 scalar, accepted tokens that a new request starts from.
    keep: float32 scalar in [0, 1), weight of the record against the last step.
    base_depth: of the `TreeShape`.
    width: of the `TreeShape`.
    shared: one arm for the whole batch, the best in weighted sum: a step takes
      as long as its largest row.
    drafter_hash: see `policy.Policy`.
  """

  weights: Float[Array, "features num_arms"]
  thresholds: Float[Array, "7"]
  depth: Int[Array, " num_arms"]
  nodes: Int[Array, " num_arms"]
  times: Float[Array, " num_arms"]
  rate: Float[Array, ""]
  prior: Float[Array, ""]
  keep: Float[Array, ""]
  base_depth: int = dataclasses.field(metadata=dict(static=True))
  width: int = dataclasses.field(metadata=dict(static=True))
  shared: bool = dataclasses.field(default=True, metadata=dict(static=True))
  drafter_hash: str | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )

  def check(self, shape: tree.TreeShape):
    for name in ("base_depth", "width"):
      checks.require(
        getattr(self, name) == getattr(shape, name),
        name,
        "be that of the tree's shape",
        getattr(self, name),
        f"{name}={getattr(shape, name)}",
      )
    policy_lib.check_table(
      np.asarray(self.depth), np.asarray(self.nodes), shape
    )

  def init_state(self, batch: int) -> RecentState:
    return RecentState(
      recent=jnp.full((batch,), self.prior, jnp.float32),
      weight=jnp.ones((batch,), jnp.float32),
    )

  def decide(self, state: RecentState, evidence) -> policy_lib.Decision:
    inputs = features(
      evidence.entropy, evidence.score, state.recent, self.thresholds
    )
    # [batch, num_arms]; accuracy matters more than speed for so few numbers.
    tokens = jnp.dot(inputs, self.weights, precision=jax.lax.Precision.HIGHEST)
    gain = tokens - (self.rate * self.times)[None, :]
    if self.shared:
      # The time is the same for all rows: only their tokens add up.
      gain = jnp.sum(state.weight[:, None] * gain, axis=0, keepdims=True)
      gain = jnp.broadcast_to(gain, tokens.shape)
    arm = jnp.argmax(gain, axis=1).astype(jnp.int32)
    return policy_lib.Decision(
      depth=self.depth[arm], nodes=self.nodes[arm], bin=arm
    )

  def update(self, state: RecentState, outcome) -> RecentState:
    accepted = outcome.accept_len.astype(jnp.float32)
    new = self.keep * state.recent + (1.0 - self.keep) * accepted
    # A step that drafted nothing says nothing about drafting.
    counted = outcome.active & (outcome.draft_levels > 0)
    left = outcome.remaining.astype(jnp.float32)
    return RecentState(
      recent=jnp.where(counted, new, state.recent),
      weight=left / jnp.maximum(jnp.max(left), 1.0),
    )
