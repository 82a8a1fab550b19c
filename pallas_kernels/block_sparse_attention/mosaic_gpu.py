# SPDX-License-Identifier: Apache-2.0
"""Hopper back end: what the kernels are given, and the custom VJP."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic_gpu_backend as backend
from pallas_kernels.block_sparse_attention import (
  masked_lists,
  mosaic_gpu_backward,
  mosaic_gpu_forward,
  tuning,
  xla,
)

_COLUMN_BLOCK = 128  # columns of one step
_FAR = jnp.iinfo(jnp.int32).max  # position of a column that no query sees
HEAD_DIMS = (64, 128, 256)
BLOCKS = (64, 128)


def block_sparse_attention(
  q,  # [batch, q_len, num_heads, head_dim]
  k,  # [batch, kv_len, num_kv_heads, head_dim]
  v,  # [batch, kv_len, num_kv_heads, head_dim]
  kv_block_indices,  # int32 [batch, num_mask_heads, num_q_blocks, max_blocks]
  num_kv_blocks,  # int32 [batch, num_mask_heads, num_q_blocks]
  q_offset,  # int32 [batch]
  kv_len,  # int32 [batch]
  *,
  block_q,
  block_kv,
  causal,
  scale,
  config: tuning.ForwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
  """See `api.block_sparse_attention`; config: schedule, default the tuned."""
  backend.check_hopper()
  check_supported(q, block_q, block_kv)
  return attention(
    q,
    k,
    v,
    kv_block_indices,
    num_kv_blocks,
    q_offset,
    kv_len,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    scale=scale,
    config=config,
  )


def check_supported(q, block_q, block_kv):
  """Raises NotImplementedError, with the reason, for what the kernel cannot."""
  backend.pallas()
  for name, value, choices in (
    ("head_dim", q.shape[-1], HEAD_DIMS),
    ("block_q", block_q, BLOCKS),
    ("block_kv", block_kv, BLOCKS),
    ("dtype", jnp.dtype(q.dtype).name, ("bfloat16", "float16")),
  ):
    if value not in choices:
      raise NotImplementedError(
        f"mosaic_gpu serves {name} of {choices}; got {name}={value!r}."
      )


def attention(
  q,
  k,
  v,
  indices,
  counts,
  q_offset,
  kv_len,
  *,
  block_q,
  block_kv,
  causal,
  scale,
  config=None,
):
  """The op without a look at the device, so that it lowers on any machine."""
  if config is None:
    config = tuning.forward_config(q.shape[-1], block_q, block_kv)
  settings = (block_q, block_kv, causal, scale, config)
  return _attention(q, k, v, indices, counts, q_offset, kv_len, settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(q, k, v, indices, counts, q_offset, kv_len, settings):
  return _forward(q, k, v, indices, counts, q_offset, kv_len, settings)


def _attention_fwd(q, k, v, indices, counts, q_offset, kv_len, settings):
  out, lse = _forward(q, k, v, indices, counts, q_offset, kv_len, settings)
  return (out, lse), (q, k, v, indices, counts, q_offset, kv_len, out, lse)


def _attention_bwd(settings, residuals, cotangents):
  head_dim = residuals[0].shape[-1]
  if head_dim not in mosaic_gpu_backward.HEAD_DIMS:
    # The fifth setting, blocks of a step, is one of the forward pass.
    return xla._attention_bwd((*settings[:4], 1), residuals, cotangents)
  gradients = mosaic_gpu_backward.backward(residuals, cotangents, settings[:4])
  return *gradients, None, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(q, k, v, indices, counts, q_offset, kv_len, settings):
  block_q, block_kv, causal, scale, config = settings
  batch, q_len, num_heads, head_dim = q.shape
  indices, num_masked = masked_lists.prepare(
    indices,
    counts,
    q_offset,
    kv_len,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
  )
  num_mask_heads, num_q_blocks, max_blocks = indices.shape[1:]
  tiling = mosaic_gpu_forward.Tiling(
    num_heads=num_heads,
    num_kv_heads=k.shape[2],
    num_mask_heads=num_mask_heads,
    num_q_blocks=num_q_blocks,
    max_blocks=max_blocks,
    head_dim=head_dim,
    block_q=block_q,
    block_kv=block_kv,
    num_rows=batch * num_mask_heads * num_q_blocks,
    causal=causal,
    scale_log2=scale * backend.LOG2_E,
    config=config,
  )
  q = backend.pad_length(q, backend.ROWS)
  k, v = (backend.pad_length(x, config.tile_kv) for x in (k, v))
  out, lse = mosaic_gpu_forward.call(
    q,
    k,
    v,
    indices.reshape(-1),
    counts.reshape(-1),
    num_masked.reshape(-1),
    q_offset,
    kv_len,
    jnp.zeros((1, config.tile_kv), jnp.int32),  # unused
    tiling,
  )
  return out[:, :q_len], jnp.swapaxes(lse, 1, 2)[:, :q_len]


def column_attention(
  q,  # [batch, q_len, num_heads, head_dim]
  k,  # [batch, max_columns, num_units, head_dim]
  v,  # [batch, max_columns, num_units, head_dim]
  positions,  # int32 [batch, num_units, num_q_blocks, max_columns]
  q_offset,  # int32 [batch]
  *,
  block_q,
  causal,
  scale,
  config: tuning.ForwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
  """See `columns.column_attention`: each query block walks the tiles of columns
  of which it sees one at least, all with a mask.
  """
  batch, q_len, num_heads, head_dim = q.shape
  num_units, num_q_blocks, num_columns = positions.shape[1:]
  if config is None:
    # As it was checked on the card: columns with clusters never ran.
    config = dataclasses.replace(
      tuning.forward_config(head_dim, block_q, _COLUMN_BLOCK), cluster=1
    )
  missing = -num_columns % _COLUMN_BLOCK
  positions = jnp.pad(
    positions, ((0, 0),) * 3 + ((0, missing),), constant_values=_FAR
  )
  tiles = positions.reshape(batch, num_units, num_q_blocks, -1, _COLUMN_BLOCK)
  last = jnp.full((batch, 1, num_q_blocks, 1), _FAR, jnp.int32)
  if causal:
    q_block = lax.broadcasted_iota(jnp.int32, last.shape, 2)
    last = q_offset[:, None, None, None] + (q_block + 1) * block_q
  is_seen = tiles.min(-1) < last
  tile = lax.broadcasted_iota(jnp.int32, is_seen.shape, 3)
  num_tiles = is_seen.shape[3]
  indices = jnp.sort(jnp.where(is_seen, tile, num_tiles), axis=-1)
  counts = is_seen.sum(-1, dtype=jnp.int32)
  tiling = mosaic_gpu_forward.Tiling(
    num_heads=num_heads,
    num_kv_heads=num_units,
    num_mask_heads=num_units,
    num_q_blocks=num_q_blocks,
    max_blocks=num_tiles,
    head_dim=head_dim,
    block_q=block_q,
    block_kv=_COLUMN_BLOCK,
    num_rows=batch * num_units * num_q_blocks,
    causal=causal,
    scale_log2=scale * backend.LOG2_E,
    config=config,
    has_columns=True,
  )
  k, v = (backend.pad_length(x, config.tile_kv) for x in (k, v))
  out, lse = mosaic_gpu_forward.call(
    backend.pad_length(q, backend.ROWS),
    k,
    v,
    indices.reshape(-1),
    counts.reshape(-1),
    counts.reshape(-1),
    q_offset,
    jnp.full((batch,), _FAR, jnp.int32),
    positions.reshape(-1, num_tiles * _COLUMN_BLOCK),
    tiling,
  )
  return out[:, :q_len], jnp.swapaxes(lse, 1, 2)[:, :q_len]
