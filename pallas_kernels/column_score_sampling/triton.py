# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for NVIDIA GPUs: two passes, no logit stored.

On a Hopper card they serve what `mosaic_gpu` refuses.

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
_MIN_PROGRAMS = 512  # of the first pass: 256 rows of 32 heads are 64 tiles


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
  sizes = _tile_sizes(capability, padded_dim, q.dtype.itemsize)
  q, k = (triton_backend.pad_axis(x, 3, padded_dim) for x in (q, k))
  # Both passes want whole tiles of rows; a tile of keys may hang over.
  multiple = max(sizes["lse"][0], sizes["sum"][0])
  missing = -num_rows % multiple
  q = triton_backend.pad_axis(q, 1, num_rows + missing)
  last_keys = jnp.pad(last_keys, ((0, 0), (0, missing)), constant_values=-1)
  k = triton_backend.pad_axis(k, 1, max(sizes["lse"][1], sizes["sum"][1]))
  call = functools.partial(
    _call, logit_scale=scale * _LOG2_E, interpret=interpret
  )
  num_row_tiles = q.shape[1] // sizes["lse"][0]
  # Few rows: their keys are split between programs.
  num_splits = max(1, _MIN_PROGRAMS // (batch * num_heads * num_row_tiles))
  num_splits = min(num_splits, pl.cdiv(kv_len, 8 * sizes["lse"][1]))
  parts = call(
    functools.partial(_lse_kernel, num_splits=num_splits),
    (q, k, last_keys),
    sizes["lse"],
    num_tiles=num_row_tiles * num_splits,
    shape=(batch, num_heads, num_splits, q.shape[1]),
    name="column_score_lse",
  )
  lse = _merge_splits(parts)
  num_key_tiles = pl.cdiv(kv_len, sizes["sum"][1])
  first, full = tiles.row_tile_ranges(
    last_keys, num_key_tiles, *sizes["sum"][:2]
  )
  scores = call(
    _sum_kernel,
    (q, k, last_keys, lse, first, full),
    sizes["sum"],
    num_tiles=num_key_tiles,
    shape=(batch, num_heads, k.shape[1]),
    name="column_score_sum",
  )
  return scores[:, :, :kv_len]


def _merge_splits(parts):
  """Base-2 log-sum-exps over splits of the keys to those over all keys.

  parts: float32 [batch, num_heads, num_splits, num_rows]; -inf: no key seen.
  Returns +inf where no split sees a key, so that nothing is counted later.
  """
  top = parts.max(2)
  is_empty = jnp.isneginf(top)
  safe_top = jnp.where(is_empty, 0.0, top)
  total = jnp.exp2(parts - safe_top[:, :, None]).sum(2)
  lse = safe_top + jnp.log2(jnp.where(is_empty, 1.0, total))
  return jnp.where(is_empty, jnp.inf, lse)


def _call(
  kernel, arrays, sizes, *, num_tiles, shape, logit_scale, interpret, name
):
  tile_rows, tile_keys, num_warps, num_stages = sizes
  return triton_backend.call(
    functools.partial(
      kernel,
      tile_rows=tile_rows,
      tile_keys=tile_keys,
      logit_scale=logit_scale,
    ),
    grid=(shape[1], num_tiles, shape[0]),  # heads, tiles, batch
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    num_warps=num_warps,
    num_stages=num_stages,
    interpret=interpret,
    name=name,
  )(*arrays)


def _lse_kernel(
  q_ref,  # [batch, num_rows, num_heads, head_dim]
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  last_keys_ref,  # int32 [batch, num_rows]
  lse_ref,  # float32 [batch, num_heads, num_splits, num_rows], base 2
  *,
  num_splits,
  tile_rows,
  tile_keys,
  logit_scale,
):
  head = pl.program_id(0)
  program = pl.num_programs(1) - 1 - pl.program_id(1)
  tile = lax.div(program, jnp.int32(num_splits))
  split = lax.rem(program, jnp.int32(num_splits))
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
  begin = lax.div(num_tiles * split, jnp.int32(num_splits))
  end = lax.div(num_tiles * (split + 1), jnp.int32(num_splits))
  middle = jnp.clip(num_full, begin, end)
  carry = lax.fori_loop(
    begin, middle, functools.partial(step, masked=False), carry
  )
  row_max, row_sum = lax.fori_loop(
    middle, end, functools.partial(step, masked=True), carry
  )
  is_empty = row_sum == 0.0
  lse = row_max + jnp.log2(jnp.where(is_empty, 1.0, row_sum))
  lse_ref[b, head, split, rows] = jnp.where(is_empty, -jnp.inf, lse)


def _sum_kernel(
  q_ref,  # [batch, num_rows, num_heads, head_dim]
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  last_keys_ref,  # int32 [batch, num_rows]
  lse_ref,  # float32 [batch, num_heads, num_rows], base 2; +inf: no key
  first_ref,  # int32 [batch, num_key_tiles]
  full_ref,  # int32 [batch, num_key_tiles]
  scores_ref,  # float32 [batch, num_heads, kv_len]
  *,
  tile_rows,
  tile_keys,
  logit_scale,
):
  head, tile, b = (pl.program_id(axis) for axis in range(3))
  num_heads, head_dim = q_ref.shape[2:]
  kv_head = lax.div(head, jnp.int32(num_heads // k_ref.shape[2]))
  keys = pl.ds(pl.multiple_of(tile * tile_keys, tile_keys), tile_keys)
  key = tile * tile_keys + jnp.arange(tile_keys, dtype=jnp.int32)
  is_key = key < k_ref.shape[1]
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
  """(rows, keys, warps, stages) of a tile, for each of the two passes.

  Measured on an H100, head_dim 128, 128K keys, 5% of rows, ms of both passes,
  with one of them varied. First: (128, 64, 4, 2) 20.6, (128, 128, 4, 2) 21.1,
  (64, 64, 4, 4) 21.8, (64, 128, 4, 2) 22.5, (64, 256, 4, 2) 25.2. Second:
  (128, 128, 4, 2) 20.6, (64, 128, 4, 3) 22.0, (128, 64, 4, 3) 22.3,
  (128, 64, 4, 2) 24.5, (256, 64, 4, 2) 30.9. Both (128, 128, 8, 3): 39.1; two
  programs a multiprocessor hide each other's exponentials.
  """
  if itemsize == 4:  # exact float32 products have no matrix instruction
    sizes = 32, 32, 4, 1
  elif head_dim > 128:
    sizes = 64, 64, 4, 1
  elif capability == 90:
    return {"lse": (128, 64, 4, 2), "sum": (128, 128, 4, 2)}
  else:
    sizes = 64, 64, 4, 3
  return {"lse": sizes, "sum": sizes}
