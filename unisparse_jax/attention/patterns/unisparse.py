"""UniSparse: block selection by attention between composite tokens.

Source: UniSparse (arXiv 2512.14082). The paper states composite tokens (means
over neighbouring tokens, optionally heads), attention in the compressed space,
aggregation to blocks and top-p. Its block size, defaults, forced blocks and
tail treatment could not be read; what stands here was chosen by measurement.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import checks
from unisparse_jax.attention import block_mask, scoring

_STRIP_ELEMENTS = 1 << 22  # float32 composite scores held at once: 16 MiB


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
    return scoring.select_blocks(
      grid,
      scores,
      scoring.forced_blocks(
        grid,
        num_sink_blocks=self.num_sink_blocks if causal else 0,
        num_local_blocks=self.num_local_blocks if causal else 0,
      ),
      top_p=self.top_p if self.top_k is None else None,
      top_k=self.top_k,
      max_blocks=self.max_blocks,
    )

  def block_scores(
    self, q, k, grid: block_mask.BlockGrid, *, scale: float | None = None
  ) -> Float[Array, "batch num_mask_heads num_q_blocks num_kv_blocks"]:
    """Attention between composites, added up over each block of keys.

    Args:
      q: [batch, q_len, num_heads, head_dim].
      k: [batch, kv_len, num_kv_heads, head_dim].
      grid: the blocks spoken of.
      scale: softmax scale; default head_dim ** -0.5.

    Returns:
      float32 [batch, num_heads // head_group, num_q_blocks, num_kv_blocks];
      the mean over the row's composite queries of their softmax, so rows sum
      to 1. The composite scores are never held for more than a strip of rows.
    """
    checks.check_qkv(q, k, None)
    checks.check_scale(scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_composites, q_counts, k_composites, k_counts = self._composites(
      q, k, grid
    )
    batch, _, num_groups, head_dim = q_composites.shape
    num_k_groups = k_composites.shape[2]
    rows = self.block_q // self.window_q
    per_block = self.block_kv // self.window_kv
    num_q_blocks, num_kv_blocks = grid.num_q_blocks, grid.num_kv_blocks

    def pad_to(x, num_blocks, per):
      missing = num_blocks * per - x.shape[1]
      return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))

    q_composites = pad_to(q_composites, num_q_blocks, rows) * scale
    q_counts = pad_to(q_counts, num_q_blocks, rows)
    k_composites = pad_to(k_composites, num_kv_blocks, per_block)
    k_counts = pad_to(k_counts, num_kv_blocks, per_block)
    # Short tail composites weigh as many tokens as they hold.
    k_bias = jnp.log(jnp.maximum(k_counts, 1).astype(jnp.float32))
    k_bias -= math.log(self.window_kv)
    # First key of each composite, last query of each: absolute positions.
    first_key = jnp.arange(k_counts.shape[1], dtype=jnp.int32) * self.window_kv

    # [num_q_blocks, batch, rows, num_k_groups, groups per k group, head_dim]
    strips = q_composites.reshape(
      batch, num_q_blocks, rows, num_k_groups, -1, head_dim
    )
    strips = jnp.moveaxis(strips, 1, 0)
    strip_counts = jnp.moveaxis(
      q_counts.reshape(batch, num_q_blocks, rows), 1, 0
    )

    def score_strip(operands):
      strip, counts, index = operands
      logits = jnp.einsum(
        "brghd,bwgd->bghrw",
        strip,
        k_composites,
        preferred_element_type=jnp.float32,
      )
      logits += k_bias[:, None, None, None, :]
      visible = (k_counts > 0)[:, None, None, None, :]
      if grid.causal:
        row = jnp.arange(rows, dtype=jnp.int32)
        last = index * self.block_q + (row + 1) * self.window_q
        last = jnp.minimum(last, grid.q_len) - 1
        last = last[None, :] + grid.q_offset[:, None]
        visible &= (
          first_key[None, None, None, None, :] <= last[:, None, None, :, None]
        )
      logits = jnp.where(visible, logits, -1e30)
      logits -= logits.max(-1, keepdims=True)
      p = jnp.where(visible, jnp.exp(logits), 0.0)
      total = p.sum(-1, keepdims=True)
      weight = counts.astype(jnp.float32)
      weight /= jnp.maximum(weight.sum(-1, keepdims=True), 1.0)
      p *= weight[:, None, None, :, None] / jnp.where(total == 0.0, 1.0, total)
      by_block = p.sum(3).reshape(batch, num_groups, num_kv_blocks, per_block)
      return by_block.sum(-1)

    strip_elements = batch * num_groups * rows * k_counts.shape[1]
    at_once = max(1, min(num_q_blocks, _STRIP_ELEMENTS // strip_elements))
    indices = jnp.arange(num_q_blocks, dtype=jnp.int32)
    scores = lax.map(
      score_strip, (strips, strip_counts, indices), batch_size=at_once
    )
    return jnp.moveaxis(scores, 0, 2)

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
