# SPDX-License-Identifier: Apache-2.0
"""How deep a step drafts and how many nodes it verifies.

A policy is a pytree whose numbers are data: another table of thresholds does
not compile anew. It decides from what the drafter shows before the target has
scored this step, so the output does not depend on it.

Source: HeteroSpec v1 (Liu et al., 2025, arXiv 2505.13254), sections 3.2 to
3.4. Differs from it in: a table of depth and nodes per bin instead of the rule
with alpha and gamma, of which `HeteroSpec.from_rule` is one case.
"""

import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax.speculative import tree

NUM_BINS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
  """What a policy sees once `base_depth` levels are drafted.

  Attributes:
    entropy: float32 [batch], natural log: sum over the best path of the
      entropies of the renormalised `width` largest draft probabilities.
    score: float32 [batch], log-probability of that path under the drafter.
    frontier_tokens: int32 [batch, width], the level's expanded nodes, best
      first.
    frontier_pool_index: int32 [batch, width], their indices in the pool.
    pool: candidates so far.
    lengths: int32 [batch], known tokens, root included.
  """

  entropy: Float[Array, " batch"]
  score: Float[Array, " batch"]
  frontier_tokens: Int[Array, "batch width"]
  frontier_pool_index: Int[Array, "batch width"]
  pool: tree.Pool
  lengths: Int[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
  """What a policy asks for.

  Attributes:
    depth: int32 [batch], deepest level kept; levels past base_depth are
      drafted only if a row asks for them or for others of their block.
    nodes: int32 [batch], draft nodes to verify, root not counted.
    bin: int32 [batch], for the statistics.
  """

  depth: Int[Array, " batch"]
  nodes: Int[Array, " batch"]
  bin: Int[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What a step, or a stretch of plain ones, brought: for policies that learn.

  Attributes:
    decision: what was asked for.
    evidence_entropy: float32 [batch]; 0 where nothing was drafted.
    accept_len: int32 [batch], accepted draft tokens.
    num_emitted: int32 [batch], tokens added; 0 for a finished row.
    bucket: int32 scalar, index of the verification bucket that ran.
    draft_levels: int32 scalar, levels that were drafted; 0: none.
    active: bool [batch], rows that took part.
    remaining: int32 [batch], tokens that a row may still get; 0 for a finished
      one.
    steps: int32 scalar, steps that this tells of; more than one only if plain.
  """

  decision: Decision
  evidence_entropy: Float[Array, " batch"]
  accept_len: Int[Array, " batch"]
  num_emitted: Int[Array, " batch"]
  bucket: Int[Array, ""]
  draft_levels: Int[Array, ""]
  active: Any
  remaining: Int[Array, " batch"]
  steps: Int[Array, ""]


@runtime_checkable
class Policy(Protocol):
  """A pytree with these pure methods, called inside the compiled loop."""

  @property
  def path_choice(self) -> Literal["cumulative", "last"]:
    """Best path: by its whole score, or by its last token's probability."""
    ...

  @property
  def drafter_hash(self) -> str | None:
    """`drafters.base.fingerprint` that the table was fitted for, or None."""
    ...

  def check(self, shape: tree.TreeShape):
    """Raises ValueError where the policy asks for more than `shape` has."""
    ...

  def init_state(self, batch: int) -> Any:
    """A pytree that the loop carries; () for none."""
    ...

  @property
  def declines(self) -> bool:
    """Whether no step drafts: plain decoding, without the drafter. Static."""
    ...

  @property
  def can_skip(self) -> bool:
    """Whether `plain_steps` may be other than 0. Static."""
    ...

  def plain_steps(self, state: Any, context: Any) -> Any:
    """int32 scalar: steps to take without a draft before the next question.

    0: the next step drafts. Asked only if `can_skip`; fewer may be taken.
    """
    ...

  def decide(self, state: Any, evidence: Evidence) -> Decision:
    """Depth and nodes of every row."""
    ...

  def prune(self, state: Any, draft: tree.DraftTree, decision, context) -> Any:
    """int32 [batch], draft nodes to verify, with the final tree in view."""
    ...

  def update(self, state: Any, outcome: Outcome) -> Any:
    """The next step's state."""
    ...


class StatelessPolicy:
  """Defaults of a policy that neither skips drafting nor learns."""

  path_choice: Literal["cumulative", "last"] = "cumulative"
  drafter_hash: str | None = None
  declines: bool = False
  can_skip = False

  def init_state(self, batch: int) -> Any:
    del batch
    return ()

  def plain_steps(self, state, context) -> Any:
    del state, context
    return jnp.int32(0)

  def prune(self, state, draft, decision, context) -> Any:
    del state, draft, context
    return decision.nodes

  def update(self, state, outcome) -> Any:
    del outcome
    return state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(StatelessPolicy):
  """The same depth and number of nodes at every step.

  Attributes:
    depth: levels, int32 scalar.
    nodes: draft nodes, root not counted, int32 scalar. 0: plain decoding.
  """

  depth: Int[Array, ""] | int
  nodes: Int[Array, ""] | int

  def check(self, shape: tree.TreeShape):
    check_table(np.asarray(self.depth), np.asarray(self.nodes), shape)

  def decide(self, state, evidence):
    del state
    rows = jnp.zeros_like(evidence.lengths)
    return Decision(
      depth=rows + jnp.asarray(self.depth, jnp.int32),
      nodes=rows + jnp.asarray(self.nodes, jnp.int32),
      bin=rows,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeteroSpec(StatelessPolicy):
  """Depth and nodes by the bin of the best path's entropy.

  Attributes:
    thresholds: float32 [7], increasing, natural-log entropies; a repeated +inf
      at the end stands for bins that do not exist. Bin i holds entropies in
      (thresholds[i - 1], thresholds[i]].
    depth: int32 [8], levels per bin.
    nodes: int32 [8], draft nodes per bin, root not counted.
    base_depth: levels at which the entropy is read; that of the `TreeShape`.
    width: K of the entropy; that of the `TreeShape`.
    path_choice: see `Policy`.
    drafter_hash: see `Policy`.
    declines: see `Policy`. A table without any node that does not decline
      drafts all the same, and throws the drafts away.
  """

  thresholds: Float[Array, "7"]
  depth: Int[Array, "8"]
  nodes: Int[Array, "8"]
  base_depth: int = dataclasses.field(metadata=dict(static=True))
  width: int = dataclasses.field(metadata=dict(static=True))
  path_choice: Literal["cumulative", "last"] = dataclasses.field(
    default="cumulative", metadata=dict(static=True)
  )
  drafter_hash: str | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )
  declines: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @classmethod
  def create(cls, *, thresholds, depth, nodes, **kwargs: Any) -> "HeteroSpec":
    """A checked policy from sequences of numbers.

    Raises:
      ValueError: thresholds are not increasing or a size is off.
    """
    thresholds = np.asarray(thresholds, np.float32)
    table = {"depth": np.asarray(depth), "nodes": np.asarray(nodes)}
    checks.check_shape("thresholds", thresholds, ("bins - 1",), (NUM_BINS - 1,))
    with np.errstate(invalid="ignore"):
      rising = np.diff(thresholds) > 0
    unused = np.isposinf(thresholds[1:])
    checks.require(
      bool(np.all(rising | unused) and not np.isnan(thresholds).any()),
      "thresholds",
      "be increasing",
      thresholds.tolist(),
      "increasing numbers, then +inf for bins that do not exist",
    )
    for name, values in table.items():
      checks.check_shape(name, values, ("bins",), (NUM_BINS,))
      checks.require(
        bool(
          np.issubdtype(values.dtype, np.integer)
          and np.all(values >= (1 if name == "depth" else 0))
        ),
        name,
        "hold integers >= 1" if name == "depth" else "hold integers >= 0",
        values.tolist(),
      )
    checks.check_choice(
      "path_choice",
      kwargs.get("path_choice", "cumulative"),
      ("cumulative", "last"),
    )
    checks.require(
      not (kwargs.get("declines") and np.any(table["nodes"])),
      "declines",
      "be False for a table with nodes",
      True,
    )
    return cls(
      thresholds=jnp.asarray(thresholds),
      depth=jnp.asarray(table["depth"], jnp.int32),
      nodes=jnp.asarray(table["nodes"], jnp.int32),
      **kwargs,
    )

  @classmethod
  def from_rule(
    cls,
    *,
    thresholds,
    base_depth: int,
    base_nodes: int,
    width: int,
    alpha: int | None = None,
    gammas: tuple[float, ...] = (0.3, 0.6, 1.0),
    first_bin: int = 0,
    **kwargs: Any,
  ) -> "HeteroSpec":
    """The paper's rule: bins below len(gammas) draft deeper and verify less.

    Bin i gets base_depth + alpha - i - first_bin levels and
    gammas[i] * base_nodes + alpha - i - first_bin nodes, rounded to the nearest
    integer; the other bins get base_depth and base_nodes.

    Args:
      thresholds: see the class.
      base_depth: levels.
      base_nodes: draft nodes, root not counted.
      width: see the class.
      alpha: default ceil(base_depth / 2), the best one in the paper's study.
      gammas: shares of the nodes, of the lowest-entropy bins.
      first_bin: 0, or 1 for the paper's other reading of the index i.
      **kwargs: path_choice, drafter_hash.
    """
    checks.check_choice("first_bin", first_bin, (0, 1))
    alpha = -(-base_depth // 2) if alpha is None else alpha
    depth, nodes = [base_depth] * NUM_BINS, [base_nodes] * NUM_BINS
    for i, gamma in enumerate(gammas):
      extra = alpha - i - first_bin
      depth[i] = base_depth + extra
      nodes[i] = round(gamma * base_nodes + extra)
    return cls.create(
      thresholds=thresholds,
      depth=depth,
      nodes=nodes,
      base_depth=base_depth,
      width=width,
      **kwargs,
    )

  def check(self, shape: tree.TreeShape):
    for name in ("base_depth", "width"):
      checks.require(
        getattr(self, name) == getattr(shape, name),
        name,
        "be that of the tree's shape",
        getattr(self, name),
        f"{name}={getattr(shape, name)}, or a policy fitted for this shape",
      )
    check_table(np.asarray(self.depth), np.asarray(self.nodes), shape)

  def decide(self, state, evidence):
    del state
    # thresholds[i - 1] < entropy <= thresholds[i]; NaN would go to the last.
    above = evidence.entropy[:, None] > self.thresholds[None, :]
    index = jnp.sum(above, axis=-1, dtype=jnp.int32)
    return Decision(depth=self.depth[index], nodes=self.nodes[index], bin=index)


def check_table(depth: np.ndarray, nodes: np.ndarray, shape: tree.TreeShape):
  """Raises ValueError where a table asks for more than a shape has."""
  checks.require(
    bool(np.all(depth <= shape.max_depth)),
    "depth",
    "be at most max_depth of the tree's shape",
    depth.tolist(),
    f"max_depth={shape.max_depth}",
  )
  checks.require(
    bool(np.all(nodes + 1 <= shape.max_nodes)),
    "nodes",
    "fit in the largest bucket beside the root",
    nodes.tolist(),
    f"nodes + 1 <= {shape.max_nodes}",
  )
