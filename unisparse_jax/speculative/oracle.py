# SPDX-License-Identifier: Apache-2.0
"""A policy that knows the output: the bound for all adaptive ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree, verification


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(policy_lib.StatelessPolicy):
  """Drafts on while the right path is in the frontier; verifies just it.

  The number of nodes is that of the smallest prefix that holds every node that
  will be accepted, so tokens per step are those of the largest tree.

  Attributes:
    reference: int32 [batch, num_tokens], the output of plain decoding.
    prompt_lengths: int32 [batch].
    base_depth: of the tree's shape.
    max_depth: of the tree's shape.
    max_nodes: of the tree's shape.
  """

  reference: Int[Array, "batch num_tokens"]
  prompt_lengths: Int[Array, " batch"]
  base_depth: int = dataclasses.field(metadata=dict(static=True))
  max_depth: int = dataclasses.field(metadata=dict(static=True))
  max_nodes: int = dataclasses.field(metadata=dict(static=True))

  @classmethod
  def create(
    cls, reference: Any, prompt_lengths: Any, shape: tree.TreeShape
  ) -> "Oracle":
    """An oracle for trees of `shape`."""
    return cls(
      reference=jnp.asarray(reference, jnp.int32),
      prompt_lengths=jnp.asarray(prompt_lengths, jnp.int32),
      base_depth=shape.base_depth,
      max_depth=shape.max_depth,
      max_nodes=shape.max_nodes,
    )

  def check(self, shape: tree.TreeShape):
    policy_lib.check_table(
      np.asarray(self.max_depth), np.asarray(self.max_nodes - 1), shape
    )

  def _token(self, lengths, ahead):
    """The token at position lengths + ahead [batch, n]; -1 past the end."""
    index = (lengths - self.prompt_lengths)[:, None] + ahead
    return jnp.take_along_axis(
      self.reference, index, axis=1, mode="fill", fill_value=-1
    )

  def decide(self, state, evidence):
    del state
    pool = evidence.pool
    usable = pool.scores > tree.EMPTY / 2
    batch = evidence.lengths.shape[0]
    node = jnp.full((batch,), -1, jnp.int32)
    for level in range(self.base_depth):
      ahead = jnp.full((batch, 1), level, jnp.int32)
      wanted = self._token(evidence.lengths, ahead)
      hit = usable & (pool.parents == node[:, None]) & (pool.tokens == wanted)
      found = jnp.argmax(hit, axis=-1).astype(jnp.int32)
      node = jnp.where(jnp.any(hit, axis=-1), found, -3)
    alive = jnp.any(evidence.frontier_pool_index == node[:, None], axis=-1)
    depth = jnp.where(alive, self.max_depth, self.base_depth)
    return policy_lib.Decision(
      depth=depth.astype(jnp.int32),
      nodes=jnp.full((batch,), self.max_nodes - 1, jnp.int32),
      bin=alive.astype(jnp.int32),
    )

  def prune(self, state, draft, decision, context):
    del state
    # What the target will say after every node, as far as it is on the path.
    targets = self._token(context.lengths, draft.depths)
    accepted = verification.accept_matches(
      draft, targets, max_depth=self.max_depth
    )
    return jnp.minimum(accepted.path[:, -1], decision.nodes)
