# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for NVIDIA GPUs older than Hopper (and Hopper, for checking).

One program attends one tile of queries of one head over its row's list. Rows
are started from the last, whose causal lists are the longest. The first
`num_masked` blocks of a list hold every block that needs a per-token mask,
whatever the order of the list; the others run in a second loop without one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import triton_backend
from pallas_kernels.block_sparse_attention import masked_lists, xla_gradient
from pallas_kernels.triton_backend import plgpu

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # finite: a row of masked logits must not make NaN


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
  capability=None,
  interpret=False,
):
  """See `api.block_sparse_attention`.

  capability: compute capability to compile for (80 is 8.0); None: the device's.
  interpret: run by Pallas' interpreter, on any device.
  """
  capability = triton_backend.target(capability, interpret)
  for name, value in (("block_q", block_q), ("block_kv", block_kv)):
    if value < 16 or not triton_backend.is_power_of_two(value):
      raise NotImplementedError(
        f"triton needs {name} to be a power of two >= 16; got {name}={value}. "
        'Use implementation="xla".'
      )
  if q.shape[-1] > 256:
    raise NotImplementedError(
      f"triton needs head_dim <= 256; got head_dim={q.shape[-1]}. "
      'Use implementation="xla".'
    )
  return xla_gradient.attend(
    functools.partial(_forward, capability=capability, interpret=interpret),
    q,
    k,
    v,
    kv_block_indices,
    num_kv_blocks,
    q_offset,
    kv_len,
    (block_q, block_kv, causal, scale),
  )


def _kernel(
  q_ref,  # [batch, q_len, num_heads, head_dim]
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  v_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  indices_ref,  # int32 [batch, num_mask_heads, num_q_blocks, max_blocks]
  counts_ref,  # int32 [batch, num_mask_heads, num_q_blocks]
  num_masked_ref,  # int32 [batch, num_mask_heads, num_q_blocks]
  q_offset_ref,  # int32 [batch]
  kv_len_ref,  # int32 [batch]
  out_ref,  # [batch, q_len, num_heads, head_dim]
  lse_ref,  # float32 [batch, q_len, num_heads]
  *,
  q_len,
  block_q,
  block_kv,
  tile_q,
  tile_kv,
  causal,
  logit_scale,
):
  head = pl.program_id(0)
  tile = pl.num_programs(1) - 1 - pl.program_id(1)
  b = pl.program_id(2)
  num_heads, head_dim = q_ref.shape[2:]
  kv_head = lax.div(head, jnp.int32(num_heads // k_ref.shape[2]))
  mask_head = lax.div(head, jnp.int32(num_heads // counts_ref.shape[1]))
  first_row = tile * tile_q
  q_block = lax.div(first_row, jnp.int32(block_q))
  row = first_row + jnp.arange(tile_q, dtype=jnp.int32)
  is_row = row < q_len
  position = q_offset_ref[b] + row
  kv_len = kv_len_ref[b]
  tiles_per_block = block_kv // tile_kv
  dot = functools.partial(triton_backend.dot, exact=True)

  rows = (b, pl.ds(first_row, tile_q), head, pl.ds(0, head_dim))
  q = plgpu.load(q_ref.at[rows], mask=is_row[:, None], other=0.0)

  def step(index, carry, masked):
    acc, row_max, row_sum = carry
    slot = lax.div(index, jnp.int32(tiles_per_block))
    part = lax.rem(index, jnp.int32(tiles_per_block))
    block = indices_ref[b, mask_head, q_block, slot]
    start = pl.multiple_of(block * block_kv + part * tile_kv, tile_kv)
    keys = (b, pl.ds(start, tile_kv), kv_head, pl.ds(0, head_dim))
    key = start + jnp.arange(tile_kv, dtype=jnp.int32)
    load = functools.partial(
      plgpu.load,
      mask=(key < kv_len)[:, None] if masked else None,
      other=0.0 if masked else None,
    )
    # [tile_q, tile_kv]
    logits = dot(q, load(k_ref.at[keys]), b_axis=1)
    logits *= logit_scale
    if masked:
      visible = jnp.broadcast_to((key < kv_len)[None, :], logits.shape)
      if causal:
        visible &= key[None, :] <= position[:, None]
      logits = jnp.where(visible, logits, -jnp.inf)
    new_max = jnp.maximum(row_max, logits.max(-1))
    p = jnp.exp2(logits - new_max[:, None])
    shrink = jnp.exp2(row_max - new_max)
    row_sum = row_sum * shrink + p.sum(-1)
    v = load(v_ref.at[keys])
    acc = acc * shrink[:, None] + dot(p.astype(v.dtype), v)
    return acc, new_max, row_sum

  carry = (
    jnp.zeros((tile_q, head_dim), jnp.float32),
    jnp.full((tile_q,), _LOWEST, jnp.float32),
    jnp.zeros((tile_q,), jnp.float32),
  )
  num_masked = num_masked_ref[b, mask_head, q_block] * tiles_per_block
  count = counts_ref[b, mask_head, q_block] * tiles_per_block
  carry = lax.fori_loop(
    0, num_masked, functools.partial(step, masked=True), carry
  )
  acc, row_max, row_sum = lax.fori_loop(
    num_masked, count, functools.partial(step, masked=False), carry
  )

  is_empty = row_sum == 0.0
  safe = jnp.where(is_empty, 1.0, row_sum)
  lse = jnp.where(is_empty, -jnp.inf, (row_max + jnp.log2(safe)) / _LOG2_E)
  out = (acc / safe[:, None]).astype(out_ref.dtype)
  plgpu.store(out_ref.at[rows], out, mask=is_row[:, None])
  plgpu.store(lse_ref.at[b, pl.ds(first_row, tile_q), head], lse, mask=is_row)


def _forward(
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
  capability,
  interpret,
):
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
  tile_q, tile_kv, num_warps, num_stages = _tile_sizes(
    capability, pl.next_power_of_2(head_dim), q.dtype.itemsize
  )
  tile_q, tile_kv = min(tile_q, block_q), min(tile_kv, block_kv)
  padded_dim = max(16, pl.next_power_of_2(head_dim))
  q, k, v = (triton_backend.pad_axis(x, 3, padded_dim) for x in (q, k, v))
  q = triton_backend.pad_axis(q, 1, tile_q)
  k, v = (triton_backend.pad_axis(x, 1, tile_kv) for x in (k, v))
  out, lse = triton_backend.call(
    functools.partial(
      _kernel,
      q_len=q_len,
      block_q=block_q,
      block_kv=block_kv,
      tile_q=tile_q,
      tile_kv=tile_kv,
      causal=causal,
      logit_scale=scale * _LOG2_E,
    ),
    grid=(num_heads, pl.cdiv(q_len, tile_q), batch),
    out_shape=(
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    ),
    num_warps=num_warps,
    num_stages=num_stages,
    interpret=interpret,
    name="block_sparse_attention",
  )(q, k, v, indices, counts, num_masked, q_offset, kv_len)
  return out[:, :q_len, :, :head_dim], lse[:, :q_len]


def _tile_sizes(capability, head_dim, itemsize):
  """(queries, keys, warps, stages) of a tile; checked to spill little.

  Chosen by compiling for each capability and reading registers, spills and
  shared memory: 164 KiB on 8.0, 100 KiB on 8.6 and 8.9, 228 KiB on 9.0. On an
  H100, head_dim 128, 128K tokens, density 0.1, TFLOP/s on kept blocks:
  (128, 128, 8, 2) 380, (128, 128, 8, 3) 374, (64, 64, 4, 3) 347,
  (128, 64, 4, 3) 307, (128, 64, 8, 2) 302, (128, 64, 8, 3) 300,
  (64, 128, 4, 2) 273. Other cards were not at hand.
  """
  if itemsize == 4:  # exact float32 products have no matrix instruction
    return (32, 32, 8, 1) if head_dim <= 128 else (16, 32, 8, 1)
  if head_dim > 128:
    return (128, 64, 8, 2) if capability == 90 else (64, 32, 4, 2)
  if head_dim <= 64:
    return 128, 64, 4, 3
  if capability == 90:
    return 128, 128, 8, 2
  return (128, 64, 8, 3) if capability == 80 else (64, 64, 4, 2)
