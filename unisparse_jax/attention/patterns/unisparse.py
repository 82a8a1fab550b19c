# SPDX-License-Identifier: Apache-2.0
"""UniSparse: block selection by attention between composite tokens.

Source: UniSparse (arXiv 2512.14082). The paper states composite tokens (means
over neighbouring tokens, optionally heads), attention in the compressed space,
aggregation to blocks and top-p. Its block size, defaults, forced blocks and
tail treatment could not be read; what stands here was chosen by measurement.
"""

import dataclasses

from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import checks
from unisparse_jax.attention import block_mask, scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniSparse:
  """Keeps the blocks with the largest attention between composite tokens.

  Attributes:
    top_p: share of the composite attention to keep in each row, in (0, 1], or
      a tuple with one for each mask head.
    top_k: number of blocks to keep in each row; if given, in place of top_p.
    window_q: queries in one composite (the paper's c_q); divides block_q.
    window_kv: keys in one composite (c_k); divides block_kv.
    head_group: consecutive query heads in one composite (c_h), which share
      their mask. None: the query heads of one key head. It divides or is a
      multiple of that number.
    num_sink_blocks: first key blocks that every row keeps (causal only).
    num_local_blocks: blocks before the diagonal that every row keeps (causal
      only).
    block_q: queries per block.
    block_kv: keys per block.
    max_blocks: room in each row's list; None: all. On overflow the best stay.
  """

  top_p: float | tuple[float, ...] = 0.95
  top_k: int | None = None
  window_q: int = 16
  window_kv: int = 16
  head_group: int | None = None
  num_sink_blocks: int = 1
  num_local_blocks: int = 0
  block_q: int = 128
  block_kv: int = 128
  max_blocks: int | None = None

  def __post_init__(self):
    checks.check_fractions("top_p", self.top_p)
    for name in ("window_q", "window_kv", "block_q", "block_kv"):
      checks.check_positive_int(name, getattr(self, name))
    for name in ("top_k", "head_group", "max_blocks"):
      if getattr(self, name) is not None:
        checks.check_positive_int(name, getattr(self, name))
    checks.check_non_negative_int("num_sink_blocks", self.num_sink_blocks)
    checks.check_non_negative_int("num_local_blocks", self.num_local_blocks)
    checks.check_divides("window_q", self.window_q, "block_q", self.block_q)
    checks.check_divides("window_kv", self.window_kv, "block_kv", self.block_kv)

  def select(
    self, q, k, *, causal=True, scale=None, q_offset=0, kv_len=None
  ) -> block_mask.BlockMask:
    """See `selector.Pattern.select`."""
    grid = block_mask.BlockGrid.create(
      q,
      k,
      block_q=self.block_q,
      block_kv=self.block_kv,
      causal=causal,
      q_offset=q_offset,
      kv_len=kv_len,
    )
    scores = self.block_scores(q, k, grid, scale=scale)
    return scoring.best_blocks(
      grid,
      scores,
      num_sink_blocks=self.num_sink_blocks if causal else 0,
      num_local_blocks=self.num_local_blocks if causal else 0,
      top_p=self.top_p if self.top_k is None else None,
      top_k=self.top_k,
      max_blocks=self.max_blocks,
    )

  def block_scores(
    self,
    q,
    k,
    grid: block_mask.BlockGrid,
    *,
    scale: float | None = None,
    over_queries: str = "mean",
  ) -> Float[Array, "batch num_mask_heads num_q_blocks num_kv_blocks"]:
    """Attention between composites, added up over each block of keys.

    Args:
      q: [batch, q_len, num_heads, head_dim].
      k: [batch, kv_len, num_kv_heads, head_dim].
      grid: the blocks spoken of.
      scale: softmax scale; default head_dim ** -0.5.
      over_queries: "mean" or "max", see `pallas_kernels.composite_scores`.

    Returns:
      float32 [batch, num_heads // head_group, num_q_blocks, num_kv_blocks];
      the mean over the row's composite queries of their softmax, so rows sum
      to 1, or the largest of them. The composite scores are never held for
      more than a strip of rows. Composites are rounded to q's dtype: products
      of bfloat16 take half the time (H200, windows of 8, 128K).
    """
    checks.check_qkv(q, k, None)
    checks.check_scale(scale)
    q_composites, q_counts, k_composites, k_counts = self._composites(
      q, k, grid
    )
    return pallas_kernels.composite_scores(
      q_composites.astype(q.dtype),
      k_composites.astype(q.dtype),
      q_counts,
      k_counts,
      window_q=self.window_q,
      window_kv=self.window_kv,
      block_q=self.block_q,
      block_kv=self.block_kv,
      causal=grid.causal,
      scale=scale,
      q_offset=grid.q_offset,
      over_queries=over_queries,
    )

  def _composites(self, q, k, grid):
    """Composite queries and keys, grouped so that their heads match."""
    per_kv_head = q.shape[2] // k.shape[2]
    group = per_kv_head if self.head_group is None else self.head_group
    checks.check_divides("head_group", group, "num_heads", q.shape[2])
    checks.require(
      group % per_kv_head == 0 or per_kv_head % group == 0,
      "head_group",
      "divide num_heads // num_kv_heads or be a multiple of it",
      group,
      f"a divisor or multiple of {per_kv_head}",
    )
    q_composites, q_counts = pallas_kernels.composite_pooling(
      q, window=self.window_q, head_group=group
    )
    k_composites, k_counts = pallas_kernels.composite_pooling(
      k,
      window=self.window_kv,
      head_group=max(1, group // per_kv_head),
      length=grid.kv_len,
    )
    return q_composites, q_counts, k_composites, k_counts
