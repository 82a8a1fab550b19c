# SPDX-License-Identifier: Apache-2.0
"""What the decoding loop records at every step, and its summary.

The loop writes one row of integers and one of floats per step and sequence into
arrays of fixed size; every mean and histogram is computed from them on the
host.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

INT_FIELDS = (
  "accept_len",  # accepted draft tokens, before a cut by EOS or the limit
  "num_emitted",  # tokens added
  "nodes",  # nodes verified for this row, root included
  "bucket",  # nodes that the compiled pass had for this row
  "bin",  # of the policy
  "terminal_rank",  # index of the deepest accepted node; 0: none accepted
  "depth",  # deepest valid node
  "draft_levels",  # levels drafted in this step; 0: drafting was skipped
)
FLOAT_FIELDS = ("entropy", "score")  # those of `policy.Evidence`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeLog:
  """Trees and accepted paths, for fitting a policy by replay.

  Attributes:
    parents: int16 [max_steps, batch, max_nodes]; see `tree.DraftTree`.
    depths: int8 [max_steps, batch, max_nodes], -1 where not valid.
    scores: float32 [max_steps, batch, max_nodes].
    path: int16 [max_steps, batch, max_depth + 1], accepted node of each depth,
      -1 for none; path[..., 0] is the root, 0.
  """

  parents: Int[Array, "max_steps batch max_nodes"]
  depths: Int[Array, "max_steps batch max_nodes"]
  scores: Float[Array, "max_steps batch max_nodes"]
  path: Int[Array, "max_steps batch max_path"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLog:
  """One entry per step and row; steps that a row did not take hold -1.

  Attributes:
    ints: int32 [max_steps, batch, len(INT_FIELDS)].
    floats: float32 [max_steps, batch, len(FLOAT_FIELDS)].
    num_steps: int32 scalar, steps taken.
    trees: or None.
  """

  ints: Int[Array, "max_steps batch num_ints"]
  floats: Float[Array, "max_steps batch num_floats"]
  num_steps: Int[Array, ""]
  trees: TreeLog | None = None

  @classmethod
  def init(
    cls,
    *,
    max_steps: int,
    batch: int,
    max_nodes: int,
    max_depth: int,
    with_trees: bool,
  ) -> "StepLog":
    """A log of no steps."""
    shape = (max_steps, batch)
    trees = None
    if with_trees:
      trees = TreeLog(
        parents=jnp.zeros((*shape, max_nodes), jnp.int16),
        depths=jnp.full((*shape, max_nodes), -1, jnp.int8),
        scores=jnp.zeros((*shape, max_nodes), jnp.float32),
        path=jnp.full((*shape, max_depth + 1), -1, jnp.int16),
      )
    return cls(
      ints=jnp.full((*shape, len(INT_FIELDS)), -1, jnp.int32),
      floats=jnp.zeros((*shape, len(FLOAT_FIELDS)), jnp.float32),
      num_steps=jnp.int32(0),
      trees=trees,
    )

  def column(self, name: str) -> np.ndarray:
    """[num_steps, batch] of one field, on the host."""
    steps = int(self.num_steps)
    if name in INT_FIELDS:
      return np.asarray(self.ints)[:steps, :, INT_FIELDS.index(name)]
    return np.asarray(self.floats)[:steps, :, FLOAT_FIELDS.index(name)]
