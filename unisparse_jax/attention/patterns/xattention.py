# SPDX-License-Identifier: Apache-2.0
"""XAttention: block scores from sums of logits along antidiagonals.

Source: XAttention (arXiv 2503.16428) and its released code, from which it
differs in: scores stay float32, any q_offset, batches with ragged lengths.

Its time is that of the scores. All of them by XLA, those behind the diagonal
too: on an H200 (8 heads of 128) selection took 0.65, 2.55, 7.9 and 31.3 ms at
16K to 128K by the threshold search and 0.65, 2.51, 7.5 and 32.2 ms by a sort
(results/frontier_{quality,study}_h200.jsonl); stride 16, a quarter of the
scores, a third of that at 16K (results/frontier_default_h200.jsonl). They are
`composite_scores` of tiles as composites, which skips the future: 0.44, 1.56
and 5.9 ms at 32K to 128K (results/frontier_selections_h200.jsonl).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import checks
from unisparse_jax.attention import block_mask, profiles, scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention:
  """Keeps the blocks whose antidiagonal sums are largest.

  An antidiagonal of a stride x stride tile crosses every vertical and every
  slash line in the tile, so its mean logit stands for the tile.

  Attributes:
    top_p: share of the estimated attention to keep in each row (the paper's
      tau), in (0, 1], or a tuple with one for each query head.
    stride: side of a tile; divides block_q and block_kv.
    num_sink_blocks: first key blocks that every row keeps (causal only).
    block_q: queries per block.
    block_kv: keys per block.
    max_blocks: room in each row's list; None: all. On overflow the best stay.
  """

  top_p: float | tuple[float, ...] = 0.9
  stride: int = 8
  num_sink_blocks: int = 1
  block_q: int = 128
  block_kv: int = 128
  max_blocks: int | None = None

  def __post_init__(self):
    checks.check_fractions("top_p", self.top_p)
    for name in ("stride", "block_q", "block_kv"):
      checks.check_positive_int(name, getattr(self, name))
    if self.max_blocks is not None:
      checks.check_positive_int("max_blocks", self.max_blocks)
    checks.check_non_negative_int("num_sink_blocks", self.num_sink_blocks)
    checks.check_divides("stride", self.stride, "block_q", self.block_q)
    checks.check_divides("stride", self.stride, "block_kv", self.block_kv)

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
    return scoring.best_blocks(
      grid,
      self.block_scores(q, k, grid, scale=scale),
      num_sink_blocks=self.num_sink_blocks if causal else 0,
      top_p=self.top_p,
      max_blocks=self.max_blocks,
    )

  def block_scores(
    self, q, k, grid: block_mask.BlockGrid, *, scale: float | None = None
  ) -> Float[Array, "batch num_heads num_q_blocks num_kv_blocks"]:
    """Softmax over tiles of their antidiagonal's mean logit, by block.

    Args:
      q: [batch, q_len, num_heads, head_dim].
      k: [batch, kv_len, num_kv_heads, head_dim].
      grid: the blocks spoken of.
      scale: softmax scale; default head_dim ** -0.5.

    Returns:
      float32 [batch, num_heads, num_q_blocks, num_kv_blocks]; rows sum to 1. A
      row of padding has all of it on the first block. Padding tokens count as
      zeros in the mean of a tile that holds others, as in the released code.
    """
    checks.check_qkv(q, k, None)
    checks.check_scale(scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    stride = self.stride
    num_queries, num_keys = profiles.num_queries(grid), profiles.num_keys(grid)
    q, q_counts = self._tiles(q, num_queries)
    k, k_counts = self._tiles(k, num_keys)
    scores = pallas_kernels.composite_scores(
      q,
      k,
      q_counts,
      k_counts,
      window_q=stride,
      window_kv=stride,
      block_q=self.block_q,
      block_kv=self.block_kv,
      causal=grid.causal,
      scale=scale / stride,
      q_offset=grid.q_offset,
      parts=stride,
    )
    first_query = self.block_q * jnp.arange(grid.num_q_blocks, dtype=jnp.int32)
    is_padding = first_query[None, :] >= num_queries[:, None]
    is_first = jnp.arange(grid.num_kv_blocks, dtype=jnp.int32) == 0
    return jnp.where(
      is_padding[:, None, :, None], is_first.astype(jnp.float32), scores
    )

  def _tiles(self, x, length):
    """Tokens up to a multiple of the stride, padding zeroed; their counts.

    A tile that holds a token counts as a whole one.
    """
    missing = -x.shape[1] % self.stride
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
    token = jnp.arange(x.shape[1], dtype=jnp.int32)
    is_valid = token[None, :] < length[:, None]
    counts = jnp.where(is_valid[:, :: self.stride], self.stride, 0)
    x = jnp.where(is_valid[:, :, None, None], x, jnp.zeros((), x.dtype))
    return x, counts.astype(jnp.int32)
