# SPDX-License-Identifier: Apache-2.0
"""Draft trees of static shape, sorted by score.

A drafter fills a `Pool` of candidates; `build` keeps the best of them. Because
a child never scores above its parent and ties go to the lower index, every
parent stands before its children: any prefix of the nodes is a valid tree, and
a node's index is its confidence rank.

Source: EAGLE-2 (Li et al., 2024), section 4, for the candidates and the
re-ranking. Differs from it in: the order of the nodes, hence no sort by pool
index, and static shapes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import checks

EMPTY = -1e30  # score of a slot that holds no candidate


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeShape:
  """Static sizes of drafting and verification.

  Attributes:
    width: children taken of each expanded node, and nodes expanded a level.
      1 gives a chain.
    base_depth: levels drafted before the policy decides.
    max_depth: deepest level that a policy may ask for; 0: base_depth.
    buckets: numbers of nodes, root included, that verification is compiled
      for; ascending. The last one is the largest tree.
    static_levels: per level, (index in the level above, rank of the child) of
      every node, or () for a tree that follows the drafter's confidence. Level
      1 hangs on the root, index 0. Then max_depth is the number of levels.
    packed: total numbers of nodes over all rows that verification is compiled
      for, ascending, or () for `buckets` nodes in every row. Rows then share
      the last of them by score, up to max_nodes each.
    level_block: levels past base_depth that are drafted between two looks at
      the depth asked for; what was drafted too deep is left out of the tree.
      Every look copies what drafting carries: on an H200 a level behind one
      costs 0.09 ms and one without 0.05. Without `unroll` every level has one.
      Tried: one switch over the number of blocks instead of nested looks takes
      as long (12M decoder, 4 / 8 / 16 levels: 0.60 / 0.77 / 1.11 ms against
      0.56 / 0.74 / 1.10) and half again as long to compile; conditions outside
      XLA's command buffers are slower (0.62 / 0.87 / 1.29).
    unroll: trace the levels one by one. In a loop, which compiles faster, XLA
      copies the drafter's cache at every step (seen in the compiled program on
      JAX 0.11.2, CPU), since the cache is written after the loop.
  """

  width: int = 10
  base_depth: int = 8
  max_depth: int = 0
  buckets: tuple[int, ...] = (1, 24, 40, 64)
  static_levels: tuple[tuple[tuple[int, int], ...], ...] = ()
  packed: tuple[int, ...] = ()
  level_block: int = 1
  unroll: bool = True

  def __post_init__(self):
    checks.check_positive_int("width", self.width)
    checks.check_positive_int("base_depth", self.base_depth)
    checks.check_positive_int("level_block", self.level_block)
    checks.check_non_negative_int("max_depth", self.max_depth)
    if self.max_depth == 0:
      object.__setattr__(self, "max_depth", self.base_depth)
    checks.require(
      self.max_depth >= self.base_depth,
      "max_depth",
      "be at least base_depth",
      self.max_depth,
      f"max_depth >= {self.base_depth}",
    )
    checks.require(len(self.buckets) > 0, "buckets", "not be empty", ())
    for name in ("buckets", "packed"):
      sizes = getattr(self, name)
      for size in sizes:
        checks.check_positive_int(name, size)
      checks.require(
        list(sizes) == sorted(set(sizes)),
        name,
        "be strictly increasing",
        sizes,
      )
    if self.static_levels:
      self._check_static()

  def _check_static(self):
    above = 1
    for level in self.static_levels:
      ok = 0 < len(level) <= self.width and len(set(level)) == len(level)
      ok = ok and all(
        0 <= parent < above and 0 <= rank < self.width for parent, rank in level
      )
      checks.require(
        ok,
        "static_levels",
        "name nodes of the level above and distinct ranks below width",
        level,
        f"parents below {above}, ranks and nodes below {self.width}",
      )
      above = len(level)
    depth = len(self.static_levels)
    checks.require(
      self.base_depth == self.max_depth == depth,
      "static_levels",
      "have base_depth = max_depth levels",
      depth,
      f"{self.base_depth} and {self.max_depth}",
    )

  @property
  def max_nodes(self) -> int:
    """Nodes of the largest tree, root included."""
    return self.buckets[-1]

  @property
  def pool_size(self) -> int:
    """Candidates that `max_depth` levels can give."""
    return self.width + (self.max_depth - 1) * self.width**2

  @property
  def num_slots(self) -> int:
    """Nodes that drafting expands at most, `width` a level."""
    return self.max_depth * self.width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
  """Candidates of a draft, parents before children.

  Attributes:
    tokens: int32 [batch, pool_size].
    parents: int32 [batch, pool_size], index in the pool, -1 for the root.
    scores: float32 [batch, pool_size], log-probability of the path from the
      root under the drafter, at most that of the parent; `EMPTY` for none.
  """

  tokens: Int[Array, "batch pool_size"]
  parents: Int[Array, "batch pool_size"]
  scores: Float[Array, "batch pool_size"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftTree:
  """Nodes sorted by score; node 0 is the root, the last known token.

  Attributes:
    tokens: int32 [batch, max_nodes].
    parents: int32 [batch, max_nodes], below the node's own index; 0 for the
      root and for empty nodes.
    depths: int32 [batch, max_nodes], 0 for the root.
    scores: float32 [batch, max_nodes], descending; 0 for the root.
    valid: bool [batch, max_nodes].
    ancestors: bool [batch, max_nodes, max_nodes], [i, j]: j is i or above it.
  """

  tokens: Int[Array, "batch max_nodes"]
  parents: Int[Array, "batch max_nodes"]
  depths: Int[Array, "batch max_nodes"]
  scores: Float[Array, "batch max_nodes"]
  valid: Bool[Array, "batch max_nodes"]
  ancestors: Bool[Array, "batch max_nodes max_nodes"]

  def prefix(self, num_nodes: int) -> "DraftTree":
    """The tree of the first `num_nodes` nodes, a static number."""
    return DraftTree(
      tokens=self.tokens[:, :num_nodes],
      parents=self.parents[:, :num_nodes],
      depths=self.depths[:, :num_nodes],
      scores=self.scores[:, :num_nodes],
      valid=self.valid[:, :num_nodes],
      ancestors=self.ancestors[:, :num_nodes, :num_nodes],
    )

  def limit(self, num_nodes: Int[Array, " batch"]) -> "DraftTree":
    """Marks nodes at or past `num_nodes`, root included, as not valid."""
    index = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None, :]
    valid = self.valid & (index < num_nodes[:, None])
    return dataclasses.replace(self, valid=valid)


def ancestors(
  parents: Int[Array, "batch num_nodes"], max_depth: int
) -> Bool[Array, "batch num_nodes num_nodes"]:
  """Ancestor-or-self matrix by doubling: ceil(log2(max_depth)) products."""
  num_nodes = parents.shape[1]
  index = jnp.arange(num_nodes, dtype=jnp.int32)
  own = index[:, None] == index[None, :]
  # [batch, num_nodes, num_nodes]
  reach = own[None] | (parents[:, :, None] == index[None, None, :])
  for _ in range(math.ceil(math.log2(max(max_depth, 1)))):
    step = reach.astype(jnp.float32)
    # Sums of at most num_nodes ones: exact in any precision that XLA picks,
    # as only zero or not matters.
    reach = jnp.einsum("bij,bjk->bik", step, step) > 0.5
  return reach


def build(
  root_tokens: Int[Array, " batch"],
  pool: Pool,
  *,
  max_nodes: int,
  max_depth: int,
) -> DraftTree:
  """The root and the max_nodes - 1 best candidates.

  Args:
    root_tokens: int32 [batch].
    pool: candidates.
    max_nodes: nodes of the tree, root included.
    max_depth: deepest level in the pool.

  Returns:
    The tree; siblings are distinct where they are in the pool.
  """
  batch, pool_size = pool.scores.shape
  kept = min(max_nodes - 1, pool_size)
  pad = max_nodes - 1 - kept
  scores, chosen = lax.top_k(pool.scores, kept)
  tokens = jnp.take_along_axis(pool.tokens, chosen, axis=1)
  pool_parents = jnp.take_along_axis(pool.parents, chosen, axis=1)
  is_empty = scores <= EMPTY / 2

  # Rank of the parent: where its pool index stands among the chosen.
  # [batch, kept, kept]
  is_parent = pool_parents[:, :, None] == chosen[:, None, :]
  rank = jnp.arange(1, kept + 1, dtype=jnp.int32)[None, None, :]
  parents = jnp.sum(jnp.where(is_parent, rank, 0), axis=-1, dtype=jnp.int32)
  parents = jnp.where(is_empty, 0, parents)

  def with_root(root, rest, fill):
    return jnp.pad(
      jnp.concatenate([root, rest], axis=1),
      ((0, 0), (0, pad)),
      constant_values=fill,
    )

  zero = jnp.zeros((batch, 1), jnp.int32)
  parents = with_root(zero, parents, 0)
  above = ancestors(parents, max_depth)
  depths = jnp.sum(above, axis=-1, dtype=jnp.int32) - 1
  return DraftTree(
    tokens=with_root(root_tokens[:, None], tokens, 0),
    parents=parents,
    depths=depths,
    scores=with_root(jnp.zeros((batch, 1), jnp.float32), scores, EMPTY),
    valid=with_root(jnp.ones((batch, 1), bool), ~is_empty, False),
    ancestors=above,
  )


def write_rows(
  buffer: Int[Array, "batch capacity"],
  values: Int[Array, "batch n"],
  starts: Int[Array, " batch"],
) -> Int[Array, "batch capacity"]:
  """Writes values[b] at buffer[b, starts[b]:]; there must be room."""
  if buffer.shape[0] == 1:
    return lax.dynamic_update_slice(buffer, values, (0, starts[0]))
  return jax.vmap(
    lambda row, new, start: lax.dynamic_update_slice(row, new, (start,))
  )(buffer, values, starts)
