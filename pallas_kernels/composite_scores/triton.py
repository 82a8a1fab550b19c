# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for NVIDIA GPUs: no composite score is stored.

One program takes a strip of composite queries of one group.

Float32 composites of up to 128 channels are multiplied twice. The first pass
finds each row's maximum and sum, the second adds the softmax up by block. Keys
come as [blocks, composites in a block]: one composite of many blocks at a time,
so that a block's sum is a sum of tiles and needs no exchange between threads.

Others, longer or of half the bytes, are multiplied once, chunk of channels by
chunk, as a matrix product is; of half the bytes in blocks that a tile does not
fit, as float32. Each row's log-sum over each block is stored,
beside the row's over all: with 16 composites to a block a sixteenth of the
scores. XLA makes probabilities of them and adds up the rows of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import triton_backend
from pallas_kernels.composite_scores import layout

_LOG2_E = math.log2(math.e)
_LOWEST = -1e38  # finite: a row of masked logits must not make NaN
_CHUNK_BYTES = 128  # channels of a long composite that are multiplied at once
_MAX_SUMS = 1 << 28  # of rows over blocks, held at once: 1 GiB


def composite_scores(
  q,  # [batch, num_q_composites * parts, num_groups, head_dim]
  k,  # [batch, num_k_composites * parts, num_k_groups, head_dim]
  q_counts,  # int32 [batch, num_q_composites]
  k_counts,  # int32 [batch, num_k_composites]
  q_offset,  # int32 [batch]
  *,
  window_q,
  window_kv,
  block_q,
  block_kv,
  causal,
  scale,
  over_queries,
  parts,
  capability=None,
  interpret=False,
):
  """See `api.composite_scores` and, for the last two, `triton_backend`."""
  capability = triton_backend.target(capability, interpret)
  rows, columns = block_q // window_q, block_kv // window_kv
  head_dim = max(16, pl.next_power_of_2(q.shape[-1]))
  is_long = parts > 1 or head_dim > 128
  sizes = _long_tile_sizes(capability, parts)
  if is_long or (q.dtype != jnp.float32 and _fits(rows, columns, sizes)):
    return _long_composite_scores(
      *(triton_backend.pad_axis(x, 3, head_dim) for x in (q, k)),
      q_counts,
      k_counts,
      q_offset,
      sizes=sizes,
      rows=rows,
      columns=columns,
      window_q=window_q,
      window_kv=window_kv,
      causal=causal,
      scale=scale,
      over_queries=over_queries,
      parts=parts,
      interpret=interpret,
    )
  q, k = (x.astype(jnp.float32) for x in (q, k))
  tile_rows, tile_blocks, num_warps, num_stages = _tile_sizes(capability)
  if rows > tile_rows or not triton_backend.is_power_of_two(rows):
    raise NotImplementedError(
      f"triton needs block_q // window_q to be a power of two <= {tile_rows}; "
      f"got block_q={block_q}, window_q={window_q}. "
      'Use implementation="xla".'
    )
  batch, num_q, num_groups, _ = q.shape
  real_q_blocks, real_kv_blocks = (
    pl.cdiv(num_q, rows),
    pl.cdiv(k.shape[1], columns),
  )
  q, q_counts = (layout.pad_composites(x, tile_rows) for x in (q, q_counts))
  k, k_counts = (
    layout.pad_composites(x, columns * tile_blocks) for x in (k, k_counts)
  )
  q, k = (triton_backend.pad_axis(x, 3, head_dim) for x in (q, k))
  num_q_blocks, num_kv_blocks = q.shape[1] // rows, k.shape[1] // columns
  bias = layout.key_bias(k_counts, window_kv) * _LOG2_E
  weight = layout.row_weights(q_counts, rows)
  if over_queries == "max":
    weight = jnp.where(weight > 0.0, 1.0, 0.0)
  scores = triton_backend.call(
    functools.partial(
      _kernel,
      rows=rows,
      window_kv=window_kv,
      tile_rows=tile_rows,
      tile_blocks=tile_blocks,
      causal=causal,
      logit_scale=scale * _LOG2_E,
      over_queries=over_queries,
    ),
    grid=(num_groups, q.shape[1] // tile_rows, batch),
    out_shape=jax.ShapeDtypeStruct(
      (batch, num_groups, num_q_blocks, num_kv_blocks), jnp.float32
    ),
    num_warps=num_warps,
    num_stages=num_stages,
    interpret=interpret,
    name="composite_scores",
  )(
    q,
    k.reshape(batch, num_kv_blocks, columns, *k.shape[2:]),
    layout.last_positions(q_counts, q_offset, window_q),
    jnp.log2(weight),  # -inf: the row counts nothing
    bias.reshape(batch, num_kv_blocks, columns),
  )
  return scores[:, :, :real_q_blocks, :real_kv_blocks]


def _kernel(
  q_ref,  # float32 [batch, num_q, num_groups, head_dim]
  k_ref,  # float32 [batch, num_kv_blocks, columns, num_k_groups, head_dim]
  last_ref,  # int32 [batch, num_q], position of the row's last query
  log_weight_ref,  # float32 [batch, num_q], base 2
  bias_ref,  # float32 [batch, num_kv_blocks, columns], base 2
  scores_ref,  # float32 [batch, num_groups, num_q_blocks, num_kv_blocks]
  *,
  rows,
  window_kv,
  tile_rows,
  tile_blocks,
  causal,
  logit_scale,
  over_queries,
):
  group = pl.program_id(0)
  tile = pl.num_programs(1) - 1 - pl.program_id(1)
  b = pl.program_id(2)
  head_dim = q_ref.shape[3]
  _, num_kv_blocks, columns, num_k_groups, _ = k_ref.shape
  k_group = lax.div(group, jnp.int32(q_ref.shape[2] // num_k_groups))
  strip = pl.ds(tile * tile_rows, tile_rows)
  q = q_ref[b, strip, group, pl.ds(0, head_dim)]
  last = last_ref[b, strip]

  def score(kv_tile, column):
    """Logits of one composite of each block: [tile_rows, tile_blocks]."""
    start = pl.multiple_of(kv_tile * tile_blocks, tile_blocks)
    blocks = pl.ds(start, tile_blocks)
    k = k_ref[b, blocks, column, k_group, pl.ds(0, head_dim)]
    logits = triton_backend.dot(q, k, b_axis=1) * logit_scale
    logits += bias_ref[b, blocks, column][None, :]
    if causal:
      block = start + jnp.arange(tile_blocks, dtype=jnp.int32)
      first_key = (block * columns + column) * window_kv
      visible = first_key[None, :] <= last[:, None]
      logits = jnp.where(visible, logits, -jnp.inf)
    return logits

  num_tiles = num_kv_blocks // tile_blocks
  if causal:
    # Tiles up to the one with the last visible key.
    reach = jnp.maximum(last.max(-1) + 1, 0)
    keys = tile_blocks * columns * window_kv
    visible_tiles = lax.div(reach + (keys - 1), jnp.int32(keys))
    visible_tiles = jnp.minimum(visible_tiles, num_tiles)
  else:
    visible_tiles = jnp.int32(num_tiles)

  def find_sum(index, carry):
    row_max, row_sum = carry
    tile = lax.div(index, jnp.int32(columns))
    logits = score(tile, lax.rem(index, jnp.int32(columns)))
    new_max = jnp.maximum(row_max, logits.max(-1))
    p = jnp.exp2(logits - new_max[:, None])
    return new_max, row_sum * jnp.exp2(row_max - new_max) + p.sum(-1)

  row_max, row_sum = lax.fori_loop(
    0,
    visible_tiles * columns,
    find_sum,
    (
      jnp.full((tile_rows,), _LOWEST, jnp.float32),
      jnp.zeros((tile_rows,), jnp.float32),
    ),
  )
  # The softmax and the row's weight in one subtraction.
  is_empty = row_sum == 0.0
  shift = row_max + jnp.log2(jnp.where(is_empty, 1.0, row_sum))
  shift = jnp.where(is_empty, jnp.inf, shift - log_weight_ref[b, strip])

  q_blocks = pl.ds(tile * (tile_rows // rows), tile_rows // rows)

  def add_up(kv_tile, _):
    def add(column, total):
      return total + jnp.exp2(score(kv_tile, column) - shift[:, None])

    zeros = jnp.zeros((tile_rows, tile_blocks), jnp.float32)
    by_row = lax.fori_loop(0, columns, add, zeros)
    by_row = by_row.reshape(tile_rows // rows, rows, tile_blocks)
    by_block = by_row.max(1) if over_queries == "max" else by_row.sum(1)
    kv_blocks = pl.ds(kv_tile * tile_blocks, tile_blocks)
    scores_ref[b, group, q_blocks, kv_blocks] = by_block
    return _

  lax.fori_loop(0, visible_tiles, add_up, None)

  def clear(kv_tile, _):
    kv_blocks = pl.ds(kv_tile * tile_blocks, tile_blocks)
    zeros = jnp.zeros((tile_rows // rows, tile_blocks), jnp.float32)
    scores_ref[b, group, q_blocks, kv_blocks] = zeros
    return _

  lax.fori_loop(visible_tiles, num_tiles, clear, None)


def _tile_sizes(capability):
  """(composite queries, key blocks, warps, stages) that fit the memory.

  Measured on an H100, head_dim 128, 128K tokens, ms: (128, 32, 4, 3) 1.43,
  (128, 64, 8, 2) 1.59, (128, 32, 4, 2) 1.68, (64, 32, 4, 3) 1.71,
  (128, 16, 4, 4) 2.04.
  """
  return (128, 32, 4, 3) if capability == 90 else (64, 32, 4, 2)


def _fits(rows, columns, sizes):
  """Whether blocks of so many composites divide a tile of `sizes`."""
  return all(
    value <= most and triton_backend.is_power_of_two(value)
    for value, most in zip((rows, columns), sizes[:2], strict=True)
  )


def _long_composite_scores(
  q,
  k,
  q_counts,
  k_counts,
  q_offset,
  *,
  sizes,
  rows,
  columns,
  window_q,
  window_kv,
  causal,
  scale,
  over_queries,
  parts,
  interpret,
):
  """The scores by row sums, which are held for one strip of rows at a time."""
  tile_rows, tile_keys, num_warps, num_stages = sizes
  for name, value, most in (
    ("q", rows, tile_rows),
    ("kv", columns, tile_keys),
  ):
    if value > most or not triton_backend.is_power_of_two(value):
      raise NotImplementedError(
        f"triton needs block_{name} // window_{name} to be a power of two <= "
        f'{most}; got {value}. Use implementation="xla".'
      )
  batch, _, num_groups, head_dim = q.shape
  num_q, num_k = q_counts.shape[1], k_counts.shape[1]
  real_q_blocks, real_kv_blocks = pl.cdiv(num_q, rows), pl.cdiv(num_k, columns)
  k = layout.pad_composites(k, tile_keys * parts)
  k_counts = layout.pad_composites(k_counts, tile_keys)
  num_kv_blocks = k_counts.shape[1] // columns
  num_tiles = pl.cdiv(num_q, tile_rows)
  most = _MAX_SUMS // (batch * num_groups * tile_rows * num_kv_blocks)
  num_strips = pl.cdiv(num_tiles, max(1, most))
  strip_rows = pl.cdiv(num_tiles, num_strips) * tile_rows
  q = layout.pad_composites(q, strip_rows * parts)
  q_counts = layout.pad_composites(q_counts, strip_rows)
  first_key = jnp.arange(num_kv_blocks, dtype=jnp.int32) * (columns * window_kv)
  k = k.reshape(batch, -1, parts, *k.shape[2:])
  bias = layout.key_bias(k_counts, window_kv) * _LOG2_E
  add_up = triton_backend.call(
    functools.partial(
      _long_kernel,
      tile_rows=tile_rows,
      tile_keys=tile_keys,
      chunk=min(head_dim, _CHUNK_BYTES // q.dtype.itemsize),
      window_kv=window_kv,
      causal=causal,
      logit_scale=scale * _LOG2_E,
    ),
    grid=(num_groups, strip_rows // tile_rows, batch),
    out_shape=(
      jax.ShapeDtypeStruct(
        (batch, num_groups, strip_rows, num_kv_blocks), jnp.float32
      ),
      jax.ShapeDtypeStruct((batch, num_groups, strip_rows), jnp.float32),
    ),
    num_warps=num_warps,
    num_stages=num_stages,
    interpret=interpret,
    name="long_composite_scores",
  )

  def score_strip(operands):
    q, last, weight = operands
    sums, lse = add_up(q, k, last, bias)
    p = jnp.exp2(sums - lse[..., None])
    if causal:  # Sums of blocks that no row of a tile sees are not written.
      is_past = first_key[None, None, :] <= last[:, :, None]
      p = jnp.where(is_past[:, None], p, 0.0)
    weight = weight[:, None, :, None]
    if over_queries == "max":
      weight = jnp.where(weight > 0.0, 1.0, 0.0)
    p = (p * weight).reshape(batch, num_groups, -1, rows, num_kv_blocks)
    return p.max(3) if over_queries == "max" else p.sum(3)

  def strips(x):  # [batch, num_q, ...] to [num_strips, batch, rows, ...]
    x = x.reshape(batch, num_strips, strip_rows, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  # [num_strips, batch, num_groups, blocks of a strip, num_kv_blocks]
  scores = lax.map(
    score_strip,
    (
      strips(q.reshape(batch, -1, parts, num_groups, head_dim)),
      strips(layout.last_positions(q_counts, q_offset, window_q)),
      strips(layout.row_weights(q_counts, rows)),
    ),
  )
  scores = jnp.moveaxis(scores, 0, 2).reshape(
    batch, num_groups, -1, num_kv_blocks
  )
  return scores[:, :, :real_q_blocks, :real_kv_blocks]


def _long_kernel(
  q_ref,  # [batch, num_q, parts, num_groups, head_dim]
  k_ref,  # [batch, num_k, parts, num_k_groups, head_dim]
  last_ref,  # int32 [batch, num_q], position of the row's last query
  bias_ref,  # float32 [batch, num_k], base 2
  sums_ref,  # float32 [batch, num_groups, num_q, num_kv_blocks], base 2
  lse_ref,  # float32 [batch, num_groups, num_q], base 2; inf: no key seen
  *,
  tile_rows,
  tile_keys,
  chunk,
  window_kv,
  causal,
  logit_scale,
):
  group = pl.program_id(0)
  tile = pl.num_programs(1) - 1 - pl.program_id(1)
  b = pl.program_id(2)
  _, _, parts, num_groups, head_dim = q_ref.shape
  num_k, num_k_groups = k_ref.shape[1], k_ref.shape[3]
  k_group = lax.div(group, jnp.int32(num_groups // num_k_groups))
  strip = pl.ds(tile * tile_rows, tile_rows)
  last = last_ref[b, strip]
  num_chunks = jnp.int32(head_dim // chunk)
  columns = num_k // sums_ref.shape[3]
  tile_blocks = tile_keys // columns

  def score(start):
    """Base-2 logits of a tile of keys: [tile_rows, tile_keys]."""
    keys = pl.ds(start, tile_keys)

    def add_chunk(index, logits):
      part = lax.div(index, num_chunks)
      channel = lax.rem(index, num_chunks) * chunk
      channels = pl.ds(pl.multiple_of(channel, chunk), chunk)
      q = q_ref[b, strip, parts - 1 - part, group, channels]
      k = k_ref[b, keys, part, k_group, channels]
      return logits + triton_backend.dot(q, k, b_axis=1)

    zeros = jnp.zeros((tile_rows, tile_keys), jnp.float32)
    logits = lax.fori_loop(0, parts * num_chunks, add_chunk, zeros)
    logits = logits * logit_scale + bias_ref[b, keys][None, :]
    if causal:
      key = start + jnp.arange(tile_keys, dtype=jnp.int32)
      visible = (key * window_kv)[None, :] <= last[:, None]
      logits = jnp.where(visible, logits, -jnp.inf)
    return logits

  visible_tiles = jnp.int32(num_k // tile_keys)
  if causal:
    # Tiles up to the one with the last visible key.
    keys = tile_keys * window_kv
    reach = jnp.maximum(last.max(-1) + keys, 0)
    visible_tiles = jnp.minimum(visible_tiles, lax.div(reach, jnp.int32(keys)))

  def add_up(kv_tile, carry):
    row_max, row_sum = carry
    logits = score(pl.multiple_of(kv_tile * tile_keys, tile_keys))
    new_max = jnp.maximum(row_max, logits.max(-1))
    p = jnp.exp2(logits - new_max[:, None])
    by_block = p.reshape(tile_rows, tile_blocks, columns).sum(2)
    blocks = pl.ds(kv_tile * tile_blocks, tile_blocks)
    # What underflows here would underflow as a probability.
    sums_ref[b, group, strip, blocks] = jnp.log2(by_block) + new_max[:, None]
    row_sum = row_sum * jnp.exp2(row_max - new_max) + by_block.sum(-1)
    return new_max, row_sum

  row_max, row_sum = lax.fori_loop(
    0,
    visible_tiles,
    add_up,
    (
      jnp.full((tile_rows,), _LOWEST, jnp.float32),
      jnp.zeros((tile_rows,), jnp.float32),
    ),
  )
  is_empty = row_sum == 0.0
  lse = row_max + jnp.log2(jnp.where(is_empty, 1.0, row_sum))
  lse_ref[b, group, strip] = jnp.where(is_empty, jnp.inf, lse)


def _long_tile_sizes(capability, parts):
  """(composite queries, composite keys, warps, stages) that fit the memory.

  Measured on an H200, see TUNING.md. Elsewhere chosen by what Triton 3.9
  compiles to: 48 KiB and 235 registers, so that two programs share a
  multiprocessor (an L4 has 100 KiB); it does not spill.
  """
  if capability != 90:
    return (64, 128, 4, 3)
  return (128, 128, 8, 4) if parts > 1 else (64, 256, 8, 3)
