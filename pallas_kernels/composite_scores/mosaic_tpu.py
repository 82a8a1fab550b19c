# SPDX-License-Identifier: Apache-2.0
"""TPU kernel: two passes over the keys for each strip of composite queries.

The grid is (batch, group, strip, pass, tile of key blocks). Keys come as
[composites in a block, blocks, head_dim], one composite of many blocks a
product, so that a block's sum is a sum of registers; a strip's rows are added
up by one small product with their weights. How many tiles a strip sees is
prefetched to scalar memory: tiles beyond are neither copied nor multiplied.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tpu_backend
from pallas_kernels.composite_scores import layout
from pallas_kernels.tpu_backend import pltpu

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # finite: a row of masked logits must not make NaN
_TILE_ROWS = 256
_TILE_BLOCKS = 128


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
  compile_only=False,
  interpret=False,
):
  """See `api.composite_scores` and, for the last two, `tpu_backend`."""
  tpu_backend.check(compile_only, interpret)
  if parts > 1:
    raise NotImplementedError(
      "mosaic_tpu needs composites of one vector; got "
      f'parts={parts}. Use implementation="xla".'
    )
  q, k = (x.astype(jnp.float32) for x in (q, k))
  rows, columns = block_q // window_q, block_kv // window_kv
  batch, num_q, num_groups, head_dim = q.shape
  real_q_blocks, real_kv_blocks = (
    pl.cdiv(num_q, rows),
    pl.cdiv(k.shape[1], columns),
  )
  # A strip is a multiple of 8 blocks of queries, unless it is all of them.
  strip_blocks = max(8, _TILE_ROWS // rows // 8 * 8)
  strip_blocks = min(strip_blocks, real_q_blocks)
  tile_blocks = min(_TILE_BLOCKS, real_kv_blocks)
  tile_rows = strip_blocks * rows
  q, q_counts = (layout.pad_composites(x, tile_rows) for x in (q, q_counts))
  k, k_counts = (
    layout.pad_composites(x, columns * tile_blocks) for x in (k, k_counts)
  )
  num_strips = q.shape[1] // tile_rows
  num_kv_blocks = k.shape[1] // columns
  num_tiles = num_kv_blocks // tile_blocks
  per_k_group = num_groups // k.shape[2]
  last = layout.last_positions(q_counts, q_offset, window_q)
  if causal:
    reach = last.reshape(batch, num_strips, tile_rows).max(-1) + 1
    visible_tiles = -(-jnp.maximum(reach, 0) // (tile_blocks * block_kv))
    visible_tiles = jnp.minimum(visible_tiles, num_tiles)
  else:
    visible_tiles = jnp.full((batch, num_strips), num_tiles, jnp.int32)
  bias = layout.key_bias(k_counts, window_kv) * _LOG2_E
  weight = layout.row_weights(q_counts, rows)

  def tile_index(b, strip, tile, visible_ref):
    """The tile, or the last one seen: a repeated index copies nothing."""
    seen = visible_ref[b * num_strips + strip]
    return jnp.maximum(jnp.minimum(tile, seen - 1), 0)

  def k_index(b, g, strip, part, tile, visible_ref):
    del part
    return b, g // per_k_group, 0, tile_index(b, strip, tile, visible_ref), 0

  def bias_index(b, g, strip, part, tile, visible_ref):
    del g, part
    return b, 0, tile_index(b, strip, tile, visible_ref)

  pairs = batch * num_groups * q.shape[1] * k.shape[1]
  scores = tpu_backend.call(
    functools.partial(
      _kernel,
      window_kv=window_kv,
      block_kv=block_kv,
      causal=causal,
      logit_scale=scale * _LOG2_E,
      over_queries=over_queries,
    ),
    num_scalar_prefetch=1,
    grid=(batch, num_groups, num_strips, 2, num_tiles),
    in_specs=[
      pl.BlockSpec(
        (None, None, tile_rows, head_dim),
        lambda b, g, strip, *_: (b, g, strip, 0),
      ),
      pl.BlockSpec((None, None, columns, tile_blocks, head_dim), k_index),
      pl.BlockSpec((None, tile_rows, 1), lambda b, g, strip, *_: (b, strip, 0)),
      pl.BlockSpec(
        (None, None, strip_blocks, tile_rows),
        lambda b, g, strip, *_: (b, strip, 0, 0),
      ),
      pl.BlockSpec((None, columns, tile_blocks), bias_index),
    ],
    out_specs=pl.BlockSpec(
      (None, None, strip_blocks, tile_blocks),
      # The first pass writes nothing: it stays at the second's first block.
      lambda b, g, strip, part, tile, _: (b, g, strip, part * tile),
    ),
    out_shape=jax.ShapeDtypeStruct(
      (batch, num_groups, num_strips * strip_blocks, num_kv_blocks),
      jnp.float32,
    ),
    scratch_shapes=[
      pltpu.VMEM((tile_rows, 1), jnp.float32),
      pltpu.VMEM((tile_rows, 1), jnp.float32),
    ],
    semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
    cost=pl.CostEstimate(
      flops=4 * pairs * head_dim,
      transcendentals=2 * pairs,
      bytes_accessed=4 * (2 * pairs // tile_rows * head_dim + q.size)
      + 4 * pairs // (rows * columns),
    ),
    interpret=interpret,
    name="composite_scores",
  )(
    visible_tiles.reshape(-1),
    jnp.transpose(q, (0, 2, 1, 3)),
    jnp.transpose(
      k.reshape(batch, num_kv_blocks, columns, -1, head_dim), (0, 3, 2, 1, 4)
    ),
    last[:, :, None],
    _spread_weights(weight, strip_blocks, rows),
    jnp.swapaxes(bias.reshape(batch, num_kv_blocks, columns), 1, 2),
  )
  return scores[:, :, :real_q_blocks, :real_kv_blocks]


def _spread_weights(weight, strip_blocks, rows):
  """float32 [batch, strips, strip_blocks, strip_blocks * rows].

  Row i of a strip's matrix holds the weights of block i's composites.
  """
  batch = weight.shape[0]
  weight = weight.reshape(batch, -1, strip_blocks, 1, rows)
  own = jnp.eye(strip_blocks, dtype=jnp.float32)[None, None, :, :, None]
  return (weight * own).reshape(batch, -1, strip_blocks, strip_blocks * rows)


def _kernel(
  visible_ref,  # int32 [batch * num_strips], scalar memory
  q_ref,  # float32 [tile_rows, head_dim]
  k_ref,  # float32 [columns, tile_blocks, head_dim]
  last_ref,  # int32 [tile_rows, 1]
  weight_ref,  # float32 [strip_blocks, tile_rows]
  bias_ref,  # float32 [columns, tile_blocks], base 2
  scores_ref,  # float32 [strip_blocks, tile_blocks]
  max_ref,  # float32 [tile_rows, 1]; after the first pass the log-sum-exp
  sum_ref,  # float32 [tile_rows, 1]
  *,
  window_kv,
  block_kv,
  causal,
  logit_scale,
  over_queries,
):
  b, strip = pl.program_id(0), pl.program_id(2)
  part, tile = pl.program_id(3), pl.program_id(4)
  columns, tile_blocks, _ = k_ref.shape
  is_seen = tile < visible_ref[b * pl.num_programs(2) + strip]

  def score(column):
    """Logits of one composite of each block: [tile_rows, tile_blocks]."""
    logits = lax.dot_general(
      q_ref[...],
      k_ref[column],
      (((1,), (1,)), ((), ())),
      precision=lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )
    logits = logits * logit_scale + bias_ref[pl.ds(column, 1), :]
    if causal:
      block = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
      first_key = (tile * tile_blocks + block) * block_kv + column * window_kv
      logits = jnp.where(first_key <= last_ref[...], logits, -jnp.inf)
    return logits

  @pl.when((part == 0) & (tile == 0))
  def _():
    max_ref[...] = jnp.full_like(max_ref, _LOWEST)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when((part == 0) & is_seen)
  def _():
    row_max, row_sum = max_ref[...], sum_ref[...]
    for column in range(columns):
      logits = score(column)
      new_max = jnp.maximum(row_max, logits.max(1, keepdims=True))
      p = jnp.exp2(logits - new_max)
      row_sum = row_sum * jnp.exp2(row_max - new_max)
      row_sum += p.sum(1, keepdims=True)
      row_max = new_max
    max_ref[...], sum_ref[...] = row_max, row_sum

  @pl.when((part == 1) & (tile == 0))
  def _():
    row_sum = sum_ref[...]
    is_empty = row_sum == 0.0
    lse = max_ref[...] + jnp.log2(jnp.where(is_empty, 1.0, row_sum))
    max_ref[...] = jnp.where(is_empty, jnp.inf, lse)

  @pl.when((part == 1) & is_seen)
  def _():
    by_row = jnp.zeros((q_ref.shape[0], tile_blocks), jnp.float32)
    for column in range(columns):
      by_row += jnp.exp2(score(column) - max_ref[...])
    if over_queries == "max":
      blocks = (weight_ref.shape[0], -1, tile_blocks)
      is_valid = weight_ref[...].sum(0)[:, None] > 0.0
      by_row = jnp.where(is_valid, by_row, 0.0)
      scores_ref[...] = by_row.reshape(blocks).max(1)
      return
    scores_ref[...] = lax.dot(
      weight_ref[...],
      by_row,
      precision=lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )

  @pl.when((part == 1) & ~is_seen)
  def _():
    scores_ref[...] = jnp.zeros_like(scores_ref)
