# SPDX-License-Identifier: Apache-2.0
"""Hopper back end, gradients: dq over the block lists, dk and dv over theirs
transposed.

With p = exp(logits - lse) and delta = <out, d_out> - d_lse,

  d_logits = p * (d_out v^T - delta)
  dq = scale * d_logits k,  dk = scale * d_logits^T q,  dv = p^T d_out.

Two kernels, each as warp-specialised as the forward one. The first holds 128
query rows and walks their list. The second holds one block of keys and walks
the query blocks that list it, for every query head of the key head in turn, so
that sums over a group stay in registers, nothing is added atomically, and two
runs give the same bits. Both recompute the logits, hence 7 products a pair of
blocks where 5 are counted.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic_gpu_backend as backend
from pallas_kernels.block_sparse_attention import (
  masked_lists,
  mosaic_gpu_dkv,
  mosaic_gpu_dq,
  tuning,
)
from pallas_kernels.block_sparse_attention import (
  mosaic_gpu_common as common,
)

_EMPTY = 1e30  # log-sum-exp of rows without keys: their p is exactly 0
HEAD_DIMS = (64, 128)


def backward(residuals, cotangents, settings, config=None):
  """dq, dk, dv of `mosaic_gpu.block_sparse_attention`.

  Args:
    residuals: (q, k, v, indices, counts, q_offset, kv_len, out, lse).
    cotangents: of (out, lse).
    settings: (block_q, block_kv, causal, scale).
    config: schedule; default the tuned.

  Returns:
    dq, dk, dv with the shapes and dtypes of q, k, v.
  """
  q, k, v, indices, counts, q_offset, kv_len, out, lse = residuals
  d_out, d_lse = cotangents
  block_q, block_kv, causal, scale = settings
  if config is None:
    config = tuning.backward_config(q.shape[-1], block_q, block_kv)
  batch, q_len, num_heads, head_dim = q.shape
  kv_capacity = k.shape[1]
  blocks = dict(block_q=block_q, block_kv=block_kv, causal=causal)
  indices, num_masked = masked_lists.prepare(
    indices, counts, q_offset, kv_len, **blocks
  )
  num_mask_heads, num_q_blocks, max_blocks = indices.shape[1:]
  tiling = common.BackwardTiling(
    num_heads=num_heads,
    num_kv_heads=k.shape[2],
    num_mask_heads=num_mask_heads,
    num_q_blocks=num_q_blocks,
    num_kv_blocks=-(-kv_capacity // block_kv),
    max_blocks=max_blocks,
    head_dim=head_dim,
    batch=batch,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    scale=scale,
    config=config,
  )
  delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
  # Fused with the transpose that follows, the sum takes 0.9 ms in place of 0.2.
  delta = lax.optimization_barrier(delta) - d_lse
  is_empty = jnp.isneginf(lse)
  lse_log2 = jnp.where(is_empty, _EMPTY, lse * backend.LOG2_E)
  delta = jnp.where(is_empty, 0.0, delta)
  statistics = _tile_statistics(lse_log2, delta, num_q_blocks * block_q)
  q, d_out = (backend.pad_length(x, backend.ROWS) for x in (q, d_out))
  k, v = (backend.pad_length(x, block_kv) for x in (k, v))
  arrays = (q, k, v, d_out, statistics)
  dq = mosaic_gpu_dq.call(
    arrays, indices, counts, num_masked, q_offset, kv_len, tiling
  )
  transposed = transpose_lists(
    indices,
    counts,
    q_offset,
    kv_len,
    **blocks,
    num_kv_blocks=tiling.num_kv_blocks,
  )
  dk, dv = mosaic_gpu_dkv.call(arrays, *transposed, q_offset, kv_len, tiling)
  return dq[:, :q_len], dk[:, :kv_capacity], dv[:, :kv_capacity]


def _tile_statistics(lse_log2, delta, padded):
  """float32 [batch, heads, padded / 64, 2, 64]: lse (base 2) and delta."""
  missing = padded - lse_log2.shape[1]

  def tile(x, fill):
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(*x.shape[:2], -1, backend.ROWS)

  return jnp.stack([tile(lse_log2, _EMPTY), tile(delta, 0.0)], axis=3)


def transpose_lists(
  indices, counts, q_offset, kv_len, *, block_q, block_kv, causal, num_kv_blocks
):
  """For each key block the query blocks that list it, one after the other.

  Args:
    indices: int32 [batch, num_mask_heads, num_q_blocks, max_blocks].
    counts: int32 [batch, num_mask_heads, num_q_blocks].
    q_offset: int32 [batch].
    kv_len: int32 [batch].
    block_q: queries per block.
    block_kv: keys per block.
    causal: whether a query sees only keys up to its own position.
    num_kv_blocks: number of key blocks.

  Returns:
    int32 [batch, num_mask_heads, num_q_blocks * max_blocks]: query blocks,
    ascending within a key block; int32 [batch, num_mask_heads, num_kv_blocks]
    three times: where a key block's part starts, its length, and how many of
    its first query blocks may need a per-token mask. Memory is that of the
    lists, not of all pairs of blocks.
  """
  batch, num_mask_heads, num_q_blocks, _ = indices.shape
  slot, q_block = (
    lax.broadcasted_iota(jnp.int32, indices.shape, axis) for axis in (3, 2)
  )
  is_listed = slot < counts[..., None]
  pair = jnp.where(
    is_listed,
    indices * num_q_blocks + q_block,
    num_kv_blocks * num_q_blocks,
  )
  pair = jnp.sort(pair.reshape(batch, num_mask_heads, -1), axis=-1)
  # Query blocks ascend: the masked ones (diagonal) are a prefix, or, in the
  # block where the valid keys end, all.
  needs_mask = is_listed & masked_lists.needs_mask(
    indices,
    q_offset,
    kv_len,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
  )
  lead = [
    lax.broadcasted_iota(jnp.int32, indices.shape, axis) for axis in (0, 1)
  ]

  def count(is_counted):
    zeros = jnp.zeros((batch, num_mask_heads, num_kv_blocks), jnp.int32)
    return zeros.at[(*lead, indices)].add(
      is_counted.astype(jnp.int32), mode="drop"
    )

  lengths = count(is_listed)
  starts = jnp.cumsum(lengths, axis=-1) - lengths
  return pair % num_q_blocks, starts, lengths, count(needs_mask)
