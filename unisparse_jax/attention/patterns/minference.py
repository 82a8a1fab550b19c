# SPDX-License-Identifier: Apache-2.0
"""MInference: per head, an A-shape, verticals and slashes, or the best blocks.

Source: MInference (arXiv 2407.02490) and its released code. Differs from it in:
slashes and windows are rounded outwards to blocks, a block-sparse head always
keeps its diagonal and divides a ragged block by its true length; any q_offset,
batches with ragged lengths.
"""

import dataclasses

import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import checks
from unisparse_jax.attention import block_mask, profiles, scoring

KINDS = ("a_shape", "vertical_slash", "block_sparse")
# The released search's, both of its versions. A_shape: first and nearest keys.
CANDIDATES = (
  ("a_shape", 100, 800),
  ("vertical_slash", 30, 800),
  ("vertical_slash", 100, 750),
  ("vertical_slash", 100, 800),
  ("vertical_slash", 500, 700),
  ("vertical_slash", 3500, 100),
  ("vertical_slash", 1000, 4096),
  ("block_sparse", 100, 0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MInference:
  """Gives each head the kind of mask that an offline search found for it.

  Attributes:
    heads: (kind, first size, second size), one for all heads or one for each:
      ("a_shape", sinks, window): the first keys and the nearest ones;
      ("vertical_slash", columns, slashes): single keys, and distances from
      query to key, that the last queries attend most;
      ("block_sparse", blocks, 0): blocks of largest mean logit in each row.
      Sizes are in tokens, those of block_sparse in blocks.
    num_last: last queries that a vertical_slash head looks at.
    min_columns: columns that such a head keeps at least; the first this many
      keys always are among them.
    min_slashes: slashes that it keeps at least.
    num_near_slashes: nearest distances that are among them.
    block_q: queries per block.
    block_kv: keys per block.

  Causal attention only: `select` raises ValueError otherwise.
  """

  heads: tuple[tuple[str, int, int], ...] = (("vertical_slash", 1000, 6096),)
  num_last: int = 64
  min_columns: int = 30
  min_slashes: int = 50
  num_near_slashes: int = 100
  block_q: int = 64
  block_kv: int = 64

  def __post_init__(self):
    object.__setattr__(self, "heads", tuple(tuple(h) for h in self.heads))
    checks.require(len(self.heads) > 0, "heads", "not be empty", self.heads)
    for head in self.heads:
      checks.require(
        len(head) == 3, "heads", "hold (kind, first, second)", head
      )
      kind, first, second = head
      checks.check_choice("heads", kind, KINDS)
      checks.check_positive_int("heads", first)
      checks.check_non_negative_int("heads", second)
      checks.require(
        second > 0 or kind == "block_sparse",
        "heads",
        "have a second size >= 1",
        head,
      )
    names = ("num_last", "min_columns", "min_slashes", "num_near_slashes")
    for name in (*names, "block_q", "block_kv"):
      checks.check_positive_int(name, getattr(self, name))

  def select(
    self, q, k, *, causal=True, scale=None, q_offset=0, kv_len=None
  ) -> block_mask.BlockMask:
    """See `selector.Pattern.select`."""
    checks.require(causal, "causal", "be True for minference", causal)
    grid = block_mask.BlockGrid.create(
      q,
      k,
      block_q=self.block_q,
      block_kv=self.block_kv,
      causal=True,
      q_offset=q_offset,
      kv_len=kv_len,
    )
    heads = self.heads * q.shape[2] if len(self.heads) == 1 else self.heads
    checks.require(
      len(heads) == q.shape[2],
      "heads",
      "be one, or one for each query head",
      len(heads),
      f"1 or {q.shape[2]}",
    )
    first, second = (
      jnp.asarray([h[i] for h in heads], jnp.int32) for i in (1, 2)
    )
    is_kind = {
      kind: jnp.asarray([h[0] == kind for h in heads])[None, :, None]
      for kind in KINDS
    }
    used = {h[0] for h in heads}
    shape = (grid.batch, len(heads), grid.kv_capacity)
    near = jnp.zeros(shape, jnp.bool_)  # by distance from query to key
    kept = jnp.zeros((*shape[:2], 1, 1), jnp.bool_)
    columns = None
    if "a_shape" in used:
      distance = jnp.arange(grid.kv_capacity, dtype=jnp.int32)
      window = distance[None, None, :] < second[None, :, None]
      near |= window & is_kind["a_shape"]
      first_key = self.block_kv * jnp.arange(
        grid.num_kv_blocks, dtype=jnp.int32
      )
      sink = first_key[None, None, :] < first[None, :, None]
      kept |= (sink & is_kind["a_shape"])[:, :, None, :]
    if "vertical_slash" in used:
      is_column, is_slash = self._columns_and_slashes(
        q, k, grid, first, second, scale
      )
      near |= is_slash & is_kind["vertical_slash"]
      sizes = [h[1] for h in heads if h[0] == "vertical_slash"]
      columns = block_mask.ColumnSet.from_dense(
        is_column & is_kind["vertical_slash"],
        min(max(self.min_columns, *sizes), grid.kv_capacity),
      )
    kept |= profiles.touched_by_slashes(grid, near)
    if "block_sparse" in used:
      best = self._best_blocks(q, k, grid, first)
      kept |= best & is_kind["block_sparse"][..., None]
    return block_mask.BlockMask.from_dense(grid, kept, columns=columns)

  def _columns_and_slashes(self, q, k, grid, num_columns, num_slashes, scale):
    """Largest columns and slashes: twice bool [batch, num_heads, kv_len]."""
    columns, slashes = profiles.attention_of_rows(
      q, k, grid, *profiles.last_rows(grid, self.num_last), scale=scale
    )
    length = profiles.num_keys(grid)[:, None]
    index = jnp.arange(grid.kv_capacity, dtype=jnp.int32)[None, None, :]
    exists = index < length[:, :, None]
    kept = []
    for profile, size, least, forced in (
      (columns, num_columns, self.min_columns, self.min_columns),
      (slashes, num_slashes, self.min_slashes, self.num_near_slashes),
    ):
      profile = jnp.where(index < forced, jnp.inf, profile)
      profile = jnp.where(exists, profile, -jnp.inf)
      count = jnp.minimum(jnp.maximum(size, least)[None, :], length)
      kept.append(scoring.top_count(profile, count))
    return kept

  def _best_blocks(self, q, k, grid, num_blocks):
    """Blocks of largest mean logit, the diagonal first, `num_blocks` a row."""
    q_pooled, _ = pallas_kernels.composite_pooling(
      q, window=self.block_q, length=profiles.num_queries(grid)
    )
    k_pooled, _ = pallas_kernels.composite_pooling(
      k, window=self.block_kv, length=profiles.num_keys(grid)
    )
    k_pooled = jnp.repeat(k_pooled, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bihd,bjhd->bhij", q_pooled, k_pooled)
    diagonal = grid.diagonal()[:, None]
    scores = jnp.where(grid.admissible()[:, None], scores, -jnp.inf)
    scores = jnp.where(diagonal, jnp.inf, scores)
    count = jnp.broadcast_to(num_blocks[None, :, None], scores.shape[:3])
    best = scoring.top_count(scores, count)
    # More diagonal blocks than the budget are kept nevertheless.
    return best | diagonal
