"""Triton kernels for NVIDIA GPUs: two passes, no logit stored.

The first pass finds the log-sum-exp of each sampled row, tile of rows by tile
of rows. The second holds a tile of keys and walks the rows that see it, so that
each column is summed by one program, in one order: same bits every time.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import triton_backend
from pallas_kernels.column_score_sampling import tiles
from pallas_kernels.triton_backend import plgpu

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # finite: a row of masked logits must not make NaN


def column_score_sampling(
  q,  # [batch, num_rows, num_heads, head_dim]
  k,  # [batch, kv_len, num_kv_heads, head_dim]
  last_keys,  # int32 [batch, num_rows], the last key that a row sees; -1: none
  *,
  scale,
  capability=None,
  interpret=False,
):
  """See `api.column_score_sampling` and, for the last two, `triton_backend`."""
  capability = triton_backend.target(capability, interpret)
  batch, num_rows, num_heads, head_dim = q.shape
  kv_len = k.shape[1]
  if head_dim > 256:
    raise NotImplementedError(
      f"triton needs head_dim <= 256; got head_dim={head_dim}. "
      'Use implementation="xla".'
    )
  padded_dim = max(16, pl.next_power_of_2(head_dim))
  tile_rows, tile_keys, num_warps, num_stages = _tile_sizes(
    capability, padded_dim, q.dtype.itemsize
  )
  num_row_tiles = pl.cdiv(num_rows, tile_rows)
  num_key_tiles = pl.cdiv(kv_len, tile_keys)
  q = triton_backend.pad_axis(q, 1, num_row_tiles * tile_rows)
  q, k = (triton_backend.pad_axis(x, 3, padded_dim) for x in (q, k))
  k = triton_backend.pad_axis(k, 1, tile_keys)
  last_keys = jnp.pad(
    last_keys, ((0, 0), (0, q.shape[1] - num_rows)), constant_values=-1
  )
  settings = dict(
    tile_rows=tile_rows, tile_keys=tile_keys, logit_scale=scale * _LOG2_E
  )
  call = functools.partial(
    triton_backend.call,
    num_warps=num_warps,
    num_stages=num_stages,
    interpret=interpret,
  )
  lse = call(
    functools.partial(_lse_kernel, **settings),
    grid=(num_heads, num_row_tiles, batch),
    out_shape=jax.ShapeDtypeStruct((batch, num_heads, q.shape[1]), jnp.float32),
    name="column_score_lse",
  )(q, k, last_keys)
  first, full = tiles.row_tile_ranges(
    last_keys, num_key_tiles, tile_rows, tile_keys
  )
  scores = call(
    functools.partial(_sum_kernel, kv_len=kv_len, **settings),
    grid=(num_heads, num_key_tiles, batch),
    out_shape=jax.ShapeDtypeStruct((batch, num_heads, k.shape[1]), jnp.float32),
    name="column_score_sum",
  )(q, k, last_keys, lse, first, full)
  return scores[:, :, :kv_len]


def _lse_kernel(
  q_ref,  # [batch, num_rows, num_heads, head_dim]
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  last_keys_ref,  # int32 [batch, num_rows]
  lse_ref,  # float32 [batch, num_heads, num_rows], base 2; +inf: no key
  *,
  tile_rows,
  tile_keys,
  logit_scale,
):
  head = pl.program_id(0)
  tile = pl.num_programs(1) - 1 - pl.program_id(1)
  b = pl.program_id(2)
  num_heads, head_dim = q_ref.shape[2:]
  kv_len, num_kv_heads = k_ref.shape[1:3]
  kv_head = lax.div(head, jnp.int32(num_heads // num_kv_heads))
  rows = pl.ds(tile * tile_rows, tile_rows)
  q = q_ref[b, rows, head, pl.ds(0, head_dim)]
  last = last_keys_ref[b, rows]

  def step(index, carry, masked):
    row_max, row_sum = carry
    start = pl.multiple_of(index * tile_keys, tile_keys)
    key = start + jnp.arange(tile_keys, dtype=jnp.int32)
    k = plgpu.load(
      k_ref.at[b, pl.ds(start, tile_keys), kv_head, pl.ds(0, head_dim)],
      mask=(key < kv_len)[:, None] if masked else None,
      other=0.0 if masked else None,
    )
    logits = triton_backend.dot(q, k, b_axis=1, exact=True) * logit_scale
    if masked:
      visible = key[None, :] <= last[:, None]
      logits = jnp.where(visible, logits, -jnp.inf)
    new_max = jnp.maximum(row_max, logits.max(-1))
    p = jnp.exp2(logits - new_max[:, None])
    return new_max, row_sum * jnp.exp2(row_max - new_max) + p.sum(-1)

  # Tiles that every row sees whole, then those that need a mask.
  num_full = lax.div(last.min(-1) + 1, jnp.int32(tile_keys))
  num_tiles = lax.div(last.max(-1) + tile_keys, jnp.int32(tile_keys))
  carry = (
    jnp.full((tile_rows,), _LOWEST, jnp.float32),
    jnp.zeros((tile_rows,), jnp.float32),
  )
  carry = lax.fori_loop(
    0, num_full, functools.partial(step, masked=False), carry
  )
  row_max, row_sum = lax.fori_loop(
    num_full, num_tiles, functools.partial(step, masked=True), carry
  )
  is_empty = row_sum == 0.0
  lse = row_max + jnp.log2(jnp.where(is_empty, 1.0, row_sum))
  lse_ref[b, head, rows] = jnp.where(is_empty, jnp.inf, lse)


def _sum_kernel(
  q_ref,  # [batch, num_rows, num_heads, head_dim]
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  last_keys_ref,  # int32 [batch, num_rows]
  lse_ref,  # float32 [batch, num_heads, num_rows], base 2; +inf: no key
  first_ref,  # int32 [batch, num_key_tiles]
  full_ref,  # int32 [batch, num_key_tiles]
  scores_ref,  # float32 [batch, num_heads, kv_len]
  *,
  kv_len,
  tile_rows,
  tile_keys,
  logit_scale,
):
  head, tile, b = (pl.program_id(axis) for axis in range(3))
  num_heads, head_dim = q_ref.shape[2:]
  kv_head = lax.div(head, jnp.int32(num_heads // k_ref.shape[2]))
  keys = pl.ds(pl.multiple_of(tile * tile_keys, tile_keys), tile_keys)
  key = tile * tile_keys + jnp.arange(tile_keys, dtype=jnp.int32)
  is_key = key < kv_len
  k = plgpu.load(
    k_ref.at[b, keys, kv_head, pl.ds(0, head_dim)],
    mask=is_key[:, None],
    other=0.0,
  )

  def step(index, total, masked):
    rows = pl.ds(pl.multiple_of(index * tile_rows, tile_rows), tile_rows)
    q = q_ref[b, rows, head, pl.ds(0, head_dim)]
    # [tile_keys, tile_rows]: the sum over rows stays inside a warp.
    logits = triton_backend.dot(k, q, b_axis=1, exact=True) * logit_scale
    if masked:
      visible = key[:, None] <= last_keys_ref[b, rows][None, :]
      logits = jnp.where(visible, logits, -jnp.inf)
    return total + jnp.exp2(logits - lse_ref[b, head, rows][None, :]).sum(1)

  total = jnp.zeros((tile_keys,), jnp.float32)
  first, full = first_ref[b, tile], full_ref[b, tile]
  total = lax.fori_loop(
    first, full, functools.partial(step, masked=True), total
  )
  num_row_tiles = q_ref.shape[1] // tile_rows
  total = lax.fori_loop(
    full, num_row_tiles, functools.partial(step, masked=False), total
  )
  plgpu.store(scores_ref.at[b, head, keys], total, mask=is_key)


def _tile_sizes(capability, head_dim, itemsize):
  """(rows, keys, warps, stages) of a tile that fit the shared memory."""
  if itemsize == 4:  # exact float32 products have no matrix instruction
    return 32, 32, 4, 1
  if head_dim > 128:
    return 64, 64, 4, 1
  if capability in (80, 90):
    return 128, 128, 8, 3
  return 64, 64, 4, 3
