# SPDX-License-Identifier: Apache-2.0
"""TPU kernels: a pass for each row's log-sum-exp, a pass for the columns.

Both let the sums run along sublanes, which adds whole registers: the first
holds logits as [keys, rows], the second as [rows, keys].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tpu_backend
from pallas_kernels.column_score_sampling import tiles
from pallas_kernels.tpu_backend import pltpu

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # finite: a row of masked logits must not make NaN
_TILE_ROWS = 256
_TILE_KEYS = 1024


def column_score_sampling(
  q,  # [batch, num_rows, num_heads, head_dim]
  k,  # [batch, kv_len, num_kv_heads, head_dim]
  last_keys,  # int32 [batch, num_rows], the last key that a row sees; -1: none
  *,
  scale,
  compile_only=False,
  interpret=False,
):
  """See `api.column_score_sampling` and, for the last two, `tpu_backend`."""
  tpu_backend.check(compile_only, interpret)
  batch, num_rows, num_heads, head_dim = q.shape
  kv_len, num_kv_heads = k.shape[1:3]
  if q.dtype == jnp.float16:  # not a TPU's type
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  tile_rows = min(_TILE_ROWS, pl.cdiv(num_rows, 16) * 16)
  tile_keys = min(_TILE_KEYS, pl.cdiv(kv_len, 128) * 128)
  num_row_tiles = pl.cdiv(num_rows, tile_rows)
  num_key_tiles = pl.cdiv(kv_len, tile_keys)
  missing = num_row_tiles * tile_rows - num_rows
  # [batch, heads, len, head_dim]
  q = jnp.pad(jnp.swapaxes(q, 1, 2), ((0, 0), (0, 0), (0, missing), (0, 0)))
  k = jnp.swapaxes(k, 1, 2)
  last_keys = jnp.pad(last_keys, ((0, 0), (0, missing)), constant_values=-1)
  precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  logit_scale = scale * _LOG2_E
  group = num_heads // num_kv_heads
  pairs = batch * num_heads * num_row_tiles * tile_rows * kv_len

  # Tiles of keys that a tile of rows sees, and the first tile of rows that a
  # tile of keys needs.
  reach = last_keys.reshape(batch, num_row_tiles, tile_rows).max(-1) + 1
  seen = -(-reach // tile_keys)
  first, full = tiles.row_tile_ranges(
    last_keys, num_key_tiles, tile_rows, tile_keys
  )

  def seen_tile(b, i, j, seen_ref):
    """The tile, or the last one seen: a repeated index copies nothing."""
    return jnp.maximum(jnp.minimum(j, seen_ref[b * num_row_tiles + i] - 1), 0)

  lse = tpu_backend.call(
    functools.partial(
      _lse_kernel, logit_scale=logit_scale, precision=precision
    ),
    num_scalar_prefetch=1,
    grid=(batch, num_heads, num_row_tiles, num_key_tiles),
    in_specs=[
      pl.BlockSpec(
        (None, None, head_dim, tile_rows), lambda b, h, i, *_: (b, h, 0, i)
      ),
      pl.BlockSpec(
        (None, None, tile_keys, head_dim),
        lambda b, h, i, j, s: (b, h // group, seen_tile(b, i, j, s), 0),
      ),
      pl.BlockSpec((None, 1, tile_rows), lambda b, h, i, *_: (b, 0, i)),
    ],
    out_specs=pl.BlockSpec(
      (None, None, 1, tile_rows), lambda b, h, i, *_: (b, h, 0, i)
    ),
    out_shape=jax.ShapeDtypeStruct(
      (batch, num_heads, 1, q.shape[2]), jnp.float32
    ),
    scratch_shapes=[pltpu.VMEM((1, tile_rows), jnp.float32)] * 2,
    cost=pl.CostEstimate(
      flops=2 * pairs * head_dim,
      transcendentals=pairs,
      bytes_accessed=pairs // tile_rows * head_dim * k.dtype.itemsize,
    ),
    interpret=interpret,
    name="column_score_lse",
  )(seen.reshape(-1), jnp.swapaxes(q, 2, 3), k, last_keys[:, None, :])

  def row_tile(b, j, i, first_ref):
    return jnp.minimum(
      jnp.maximum(i, first_ref[b * num_key_tiles + j]), num_row_tiles - 1
    )

  scores = tpu_backend.call(
    functools.partial(
      _sum_kernel, logit_scale=logit_scale, precision=precision
    ),
    num_scalar_prefetch=2,
    grid=(batch, num_heads, num_key_tiles, num_row_tiles),
    in_specs=[
      pl.BlockSpec(
        (None, None, tile_rows, head_dim),
        lambda b, h, j, i, f, _: (b, h, row_tile(b, j, i, f), 0),
      ),
      pl.BlockSpec(
        (None, None, tile_keys, head_dim),
        lambda b, h, j, *_: (b, h // group, j, 0),
      ),
      pl.BlockSpec(
        (None, tile_rows, 1),
        lambda b, h, j, i, f, _: (b, row_tile(b, j, i, f), 0),
      ),
      pl.BlockSpec(
        (None, None, tile_rows, 1),
        lambda b, h, j, i, f, _: (b, h, row_tile(b, j, i, f), 0),
      ),
    ],
    out_specs=pl.BlockSpec(
      (None, None, 1, tile_keys), lambda b, h, j, *_: (b, h, 0, j)
    ),
    out_shape=jax.ShapeDtypeStruct((batch, num_heads, 1, kv_len), jnp.float32),
    cost=pl.CostEstimate(
      flops=2 * pairs * head_dim,
      transcendentals=pairs,
      bytes_accessed=pairs // tile_keys * head_dim * q.dtype.itemsize,
    ),
    interpret=interpret,
    name="column_score_sum",
  )(
    first.reshape(-1),
    full.reshape(-1),
    q,
    k,
    last_keys[:, :, None],
    jnp.swapaxes(lse, 2, 3),
  )
  return scores[:, :, 0]


def _lse_kernel(
  seen_ref,  # int32 [batch * num_row_tiles], scalar memory
  q_ref,  # [head_dim, tile_rows]
  k_ref,  # [tile_keys, head_dim]
  last_ref,  # int32 [1, tile_rows]
  lse_ref,  # float32 [1, tile_rows], base 2; +inf: the row sees no key
  max_ref,  # float32 [1, tile_rows]
  sum_ref,  # float32 [1, tile_rows]
  *,
  logit_scale,
  precision,
):
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    max_ref[...] = jnp.full_like(max_ref, _LOWEST)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(j < seen_ref[b * pl.num_programs(2) + i])
  def _():
    logits = lax.dot(
      k_ref[...],
      q_ref[...],
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    key = j * k_ref.shape[0] + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    logits = jnp.where(key <= last_ref[...], logits * logit_scale, -jnp.inf)
    old_max = max_ref[...]
    new_max = jnp.maximum(old_max, logits.max(0, keepdims=True))
    p = jnp.exp2(logits - new_max)
    max_ref[...] = new_max
    sum_ref[...] = sum_ref[...] * jnp.exp2(old_max - new_max) + p.sum(
      0, keepdims=True
    )

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    total = sum_ref[...]
    is_empty = total == 0.0
    lse = max_ref[...] + jnp.log2(jnp.where(is_empty, 1.0, total))
    lse_ref[...] = jnp.where(is_empty, jnp.inf, lse)


def _sum_kernel(
  first_ref,  # int32 [batch * num_key_tiles], scalar memory
  full_ref,  # int32 [batch * num_key_tiles], scalar memory
  q_ref,  # [tile_rows, head_dim]
  k_ref,  # [tile_keys, head_dim]
  last_ref,  # int32 [tile_rows, 1]
  lse_ref,  # float32 [tile_rows, 1], base 2; +inf: the row sees no key
  scores_ref,  # float32 [1, tile_keys]
  *,
  logit_scale,
  precision,
):
  b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  at = b * pl.num_programs(2) + j
  tile_keys = k_ref.shape[0]

  @pl.when(i == 0)
  def _():
    scores_ref[...] = jnp.zeros_like(scores_ref)

  def add(masked):
    logits = lax.dot_general(
      q_ref[...],
      k_ref[...],
      (((1,), (1,)), ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    logits *= logit_scale
    if masked:
      key = j * tile_keys + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
      logits = jnp.where(key <= last_ref[...], logits, -jnp.inf)
    p = jnp.exp2(logits - lse_ref[...])
    scores_ref[...] += p.sum(0, keepdims=True)

  pl.when((i >= first_ref[at]) & (i < full_ref[at]))(lambda: add(True))
  pl.when((i >= first_ref[at]) & (i >= full_ref[at]))(lambda: add(False))
