"""XAttention: block scores from sums of logits along antidiagonals.

Source: XAttention (arXiv 2503.16428) and its released code, from which it
differs in: scores stay float32, any q_offset, batches with ragged lengths.

Its time is that of the scores, which XLA makes: on an H200 (8 heads of 128)
selection takes 0.65, 2.55, 7.9 and 31.3 ms at 16K to 128K by the threshold
search and took 0.65, 2.51, 7.5 and 32.2 ms by a sort
(results/frontier_{quality,study}_h200.jsonl). Stride 16 asks for a quarter of
the scores and takes a third of the time at 16K
(results/frontier_default_h200.jsonl).
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import checks
from unisparse_jax.attention import block_mask, profiles, scoring

_STRIP_ELEMENTS = 1 << 22  # float32 scores held at once: 16 MiB


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
    batch, _, num_heads, _ = q.shape
    stride, num_kv_heads = self.stride, k.shape[2]
    num_q_blocks, num_kv_blocks = grid.num_q_blocks, grid.num_kv_blocks
    rows, per_block = self.block_q // stride, self.block_kv // stride
    num_queries, num_keys = profiles.num_queries(grid), profiles.num_keys(grid)

    def to_tiles(x, num_tiles, length, order):
      # [batch, len, heads, head_dim] to [batch, tiles, heads, stride * dim]
      x = jnp.pad(
        x, ((0, 0), (0, num_tiles * stride - x.shape[1]), (0, 0), (0, 0))
      )
      token = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
      is_valid = (token < length[:, None])[:, :, None, None]
      x = jnp.where(is_valid, x, jnp.zeros((), x.dtype))
      x = x.reshape(batch, num_tiles, stride, *x.shape[2:])[:, :, ::order]
      x = jnp.moveaxis(x, 2, 3)
      return x.reshape(*x.shape[:3], -1)

    q_tiles = to_tiles(q, num_q_blocks * rows, num_queries, -1)
    k_tiles = to_tiles(k, num_kv_blocks * per_block, num_keys, 1)
    # [num_q_blocks, batch, rows, num_kv_heads, group, stride * head_dim]
    strips = q_tiles.reshape(
      batch, num_q_blocks, rows, num_kv_heads, num_heads // num_kv_heads, -1
    )
    strips = jnp.moveaxis(strips, 1, 0)
    first_key = jnp.arange(k_tiles.shape[1], dtype=jnp.int32) * stride
    is_sink = jnp.arange(num_kv_blocks, dtype=jnp.int32) == 0

    def score_strip(operands):
      strip, index = operands
      attn_logits = (scale / stride) * jnp.einsum(
        "brhgd,bthd->bhgrt",
        strip,
        k_tiles,
        preferred_element_type=jnp.float32,
      )
      # Tiles by their last query and first key; [batch, rows, tiles]
      first_query = index * self.block_q + stride * jnp.arange(
        rows, dtype=jnp.int32
      )
      visible = first_key[None, None, :] < num_keys[:, None, None]
      if grid.causal:
        last = first_query[None, :] + (stride - 1) + grid.q_offset[:, None]
        visible &= first_key[None, None, :] <= last[:, :, None]
      is_counted = first_query[None, :] < num_queries[:, None]
      visible &= is_counted[:, :, None]
      visible = visible[:, None, None]
      attn_logits = jnp.where(visible, attn_logits, -jnp.inf)
      top = attn_logits.max(-1, keepdims=True)
      p = jnp.exp(attn_logits - jnp.where(jnp.isneginf(top), 0.0, top))
      mass = p.sum(-1, keepdims=True)
      p /= jnp.where(mass == 0.0, 1.0, mass)
      by_block = p.sum(3).reshape(batch, num_heads, num_kv_blocks, per_block)
      count = is_counted.sum(-1, dtype=jnp.int32)[:, None, None]
      by_block = by_block.sum(-1) / jnp.maximum(count, 1).astype(jnp.float32)
      padding = is_sink[None, None, :].astype(jnp.float32)
      return jnp.where(count > 0, by_block, padding)

    strip_elements = batch * num_heads * rows * k_tiles.shape[1]
    scores = lax.map(
      score_strip,
      (strips, jnp.arange(num_q_blocks, dtype=jnp.int32)),
      batch_size=max(1, min(num_q_blocks, _STRIP_ELEMENTS // strip_elements)),
    )
    return jnp.moveaxis(scores, 0, 2)
