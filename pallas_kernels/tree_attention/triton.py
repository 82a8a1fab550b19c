# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for NVIDIA GPUs: one launch, or two for a longer cache.

A decoding step of a small model waits for launches more than for memory: XLA's
back end is about a dozen kernels a layer. Here a program holds a tile of the
queries that share a key head and walks the cache's valid slots, then the new
tokens. Where the cache is long, several programs share it, one more has the new
tokens, and a second kernel merges what they found. A tile of tokens that do not
count walks nothing. Arrays are read and written as they lie. On an H200, a
layer of 10 heads, 2 key heads of 64 and 1,280 slots, fastest of 20 on a busy
card: one token of 64 rows 32.3 us with a program a multiprocessor, 21.1 with up
to three, 21.5 with three stages instead of two; 64 tokens of 16 rows 36.6, 26.9
and 31.4, both 26.8; of 64 rows 76.2, with three stages 63.0. With one program,
two stages and 300 slots: one token 8.3 (XLA 11.6), 8 tokens 10.7 (17.9), 64
tokens 10.1 (19.3); float32 12.4 (14.4), 64 tokens 19.8 (18.8); one token at
30,000 slots 22.8 (17.3).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import device, triton_backend
from pallas_kernels.triton_backend import plgpu

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # finite: a row of masked logits must not make NaN
_MAX_SHARERS = 32
# Programs a multiprocessor: a walk waits more than it computes. Compiled for
# 9.0, a tile of 64 rows takes 126 to 164 registers: 3 or 4 programs fit.
_RESIDENT = 3
_MERGE_ROWS = 16
_DTYPES = ("float32", "bfloat16", "float16")


def tree_attention(
  q,  # [batch, q_len, num_heads, head_dim]
  cache_k,  # [batch, num_kv_heads, capacity, head_dim]
  cache_v,  # [batch, num_kv_heads, capacity, head_dim]
  cache_len,  # int32 [batch]
  tree_k,  # [batch, tree_len, num_kv_heads, head_dim]
  tree_v,  # [batch, tree_len, num_kv_heads, head_dim]
  tree_mask,  # bool [batch, q_len, tree_len]
  counts=None,  # int32 [batch], or None
  starts=None,  # int32 [batch] in a flat row, or None
  *,
  scale,
  tile=None,
  capability=None,
  interpret=False,
):
  """See `api.tree_attention` and, for the last two, `triton_backend`.

  tile: rows, keys, warps, pipeline stages, and programs that share the keys of
    a row: 1, or one for the new tokens and the others for the cache. A row is a
    query of one head. Default: `default_tile`.
  """
  triton_backend.target(capability, interpret)
  num_heads, head_dim = q.shape[2:]
  num_kv_heads, capacity = cache_k.shape[1:3]
  batch, q_len, tree_len = tree_mask.shape
  triton_backend.check_head_dim(head_dim, instead="xla")
  if q.dtype.name not in _DTYPES:
    raise NotImplementedError(
      f"triton needs q of dtype {' or '.join(_DTYPES)}; got {q.dtype.name}. "
      'Use implementation="xla".'
    )
  group = num_heads // num_kv_heads
  tile_rows, tile_keys, num_warps, num_stages, splits = tile or default_tile(
    num_rows=q_len * group,
    num_walks=batch * num_kv_heads,
    capacity=capacity,
    head_dim=head_dim,
    itemsize=q.dtype.itemsize,
  )
  num_tiles = pl.cdiv(q_len * group, tile_rows)
  # [batch or 1, q_len or packed times num_heads, head_dim]:
  # the same bytes, one axis of rows.
  rows = q.reshape(q.shape[0], q.shape[1] * num_heads, head_dim)
  shape = jax.ShapeDtypeStruct((splits, *rows.shape), jnp.float32)
  lse_shape = jax.ShapeDtypeStruct(shape.shape[:3], jnp.float32)
  if splits == 1:
    shape = jax.ShapeDtypeStruct(shape.shape, q.dtype)
  out = triton_backend.call(
    functools.partial(
      _kernel,
      q_len=q_len,
      tree_len=tree_len,
      group=group,
      tile_rows=tile_rows,
      tile_keys=tile_keys,
      tile_tree=min(tile_keys, max(16, pl.next_power_of_2(tree_len))),
      num_tiles=num_tiles,
      splits=splits,
      logit_scale=scale * _LOG2_E,
    ),
    grid=(num_kv_heads, num_tiles * splits, batch),
    out_shape=(shape,) if splits == 1 else (shape, lse_shape),
    num_warps=num_warps,
    num_stages=num_stages,
    interpret=interpret,
    name="tree_attention",
  )(
    rows,
    cache_k,
    cache_v,
    cache_len,
    tree_k,
    tree_v,
    jnp.asarray(tree_mask).astype(jnp.int8).reshape(batch, q_len * tree_len),
    counts,
    starts,
  )
  if splits > 1:
    out = triton_backend.call(
      functools.partial(_merge_kernel, num_heads=num_heads),
      grid=(pl.cdiv(rows.shape[1], _MERGE_ROWS), rows.shape[0]),
      out_shape=(jax.ShapeDtypeStruct((1, *rows.shape), q.dtype),),
      num_warps=4,
      num_stages=1,
      interpret=interpret,
      name="tree_attention_merge",
    )(*out, counts, starts)
  return out[0].reshape(q.shape)


def default_tile(*, num_rows, num_walks, capacity, head_dim, itemsize):
  """A tile for this problem, of the form that `tree_attention` takes.

  Args:
    num_rows: queries of all heads that share a key head.
    num_walks: key heads of the whole batch.
    capacity: slots of the cache.
    head_dim: channels.
    itemsize: bytes of an element of q.
  """
  # Compiled for 9.0 these spill nothing, but 380 bytes for float32 of 256.
  if itemsize == 4:  # exact float32 products have no matrix instruction
    most_rows, num_stages = 16, 1
    tile_keys = 32 if head_dim <= 64 else 16
  else:
    # Three stages of 128 channels would not fit the 99 KB of 8.6 and 8.9.
    most_rows, num_stages = 64, 3 if head_dim <= 64 else 2
    tile_keys = 64 if head_dim <= 128 else 32
  tile_rows = min(most_rows, max(16, pl.next_power_of_2(num_rows)))
  # As many programs as the card holds, but at least two tiles of keys for each:
  # the merge costs a launch.
  num_programs = num_walks * pl.cdiv(num_rows, tile_rows)
  sharers = min(
    _RESIDENT * device.num_multiprocessors() // num_programs,
    capacity // (2 * tile_keys),
    _MAX_SHARERS,
  )
  splits = sharers + 1 if sharers > 1 else 1
  num_warps = 8 if head_dim * itemsize > 256 else 4
  return tile_rows, tile_keys, num_warps, num_stages, splits


def _kernel(
  q_ref,  # [batch, q_len * num_heads, head_dim], or flat
  cache_k_ref,  # [batch, num_kv_heads, capacity, head_dim]
  cache_v_ref,  # [batch, num_kv_heads, capacity, head_dim]
  cache_len_ref,  # int32 [batch]
  tree_k_ref,  # [batch, tree_len, num_kv_heads, head_dim], or flat
  tree_v_ref,  # as tree_k_ref
  mask_ref,  # int8 [batch, q_len * tree_len]
  counts_ref,  # int32 [batch], or None
  starts_ref,  # int32 [batch], or None
  out_ref,  # [splits, ...] as q_ref
  lse_ref=None,  # float32, as out_ref without its channels; base 2
  *,
  q_len,
  tree_len,
  group,
  tile_rows,
  tile_keys,
  tile_tree,
  num_tiles,
  splits,
  logit_scale,
):
  head, program, b = (pl.program_id(axis) for axis in range(3))
  tile = lax.rem(program, jnp.int32(num_tiles))
  split = lax.div(program, jnp.int32(num_tiles))
  num_kv_heads, capacity, head_dim = cache_k_ref.shape[1:]
  num_rows = q_len * group
  num_heads = num_kv_heads * group
  # Where this row's tokens lie: a row of the arrays, and its first token.
  place, first = (b, 0) if starts_ref is None else (0, starts_ref[b])
  dot = functools.partial(triton_backend.dot, exact=True)

  def index_in_q(row):
    query, member = lax.div(row, jnp.int32(group)), lax.rem(row, group)
    return (first + query) * num_heads + head * group + member

  row = tile * tile_rows + jnp.arange(tile_rows, dtype=jnp.int32)
  end_row, end_tree, is_live = num_rows, tree_len, 1
  if counts_ref is not None:
    end_tree = jnp.minimum(counts_ref[b], tree_len)
    end_row = end_tree * group
    # 1 or 0; a tile of rows that do not count walks nothing.
    is_live = (tile * tile_rows < end_row).astype(jnp.int32)
  # Past an end the last row, slot or token is read again, and does not count.
  near_row = jnp.minimum(row, jnp.maximum(end_row - 1, 0))
  near_q = index_in_q(near_row)
  if starts_ref is not None:  # a row of no tokens may start at the very end
    near_q = jnp.minimum(near_q, q_ref.shape[1] - 1)
  q = q_ref[place, near_q, :]

  def attend(carry, k, v, visible):
    acc, row_max, row_sum = carry
    # [tile_rows, keys]
    logits = dot(q, k.astype(q.dtype), b_axis=1) * logit_scale
    logits = jnp.where(visible, logits, -jnp.inf)
    new_max = jnp.maximum(row_max, logits.max(-1))
    p = jnp.exp2(logits - new_max[:, None])
    shrink = jnp.exp2(row_max - new_max)
    row_sum = row_sum * shrink + p.sum(-1)
    acc = acc * shrink[:, None] + dot(p.astype(q.dtype), v.astype(q.dtype))
    return acc, new_max, row_sum

  cache_len = jnp.minimum(cache_len_ref[b], capacity)

  def attend_cache(index, carry):
    key = index * tile_keys + jnp.arange(tile_keys, dtype=jnp.int32)
    near = jnp.minimum(key, cache_len - 1)
    k = cache_k_ref[b, head, near, :]
    v = cache_v_ref[b, head, near, :]
    visible = jnp.broadcast_to(
      (key < cache_len)[None, :], (tile_rows, tile_keys)
    )
    return attend(carry, k, v, visible)

  def attend_tree(index, carry):
    key = index * tile_tree + jnp.arange(tile_tree, dtype=jnp.int32)
    near = jnp.minimum(key, end_tree - 1)
    query = lax.div(near_row, jnp.int32(group))
    seen = mask_ref[b, query[:, None] * tree_len + near[None, :]]
    visible = (seen != 0) & (key < end_tree)[None, :]
    k = tree_k_ref[place, first + near, head, :]
    v = tree_v_ref[place, first + near, head, :]
    return attend(carry, k, v, visible)

  carry = (
    jnp.zeros((tile_rows, head_dim), jnp.float32),
    jnp.full((tile_rows,), _LOWEST, jnp.float32),
    jnp.zeros((tile_rows,), jnp.float32),
  )
  num_walked = lax.div(cache_len + (tile_keys - 1), jnp.int32(tile_keys))
  num_walked *= is_live

  sharers = max(1, splits - 1)

  def first_of(sharer):
    first = lax.div(num_walked * sharer + (sharers - 1), jnp.int32(sharers))
    return jnp.minimum(first, num_walked)

  carry = lax.fori_loop(
    first_of(split), first_of(split + 1), attend_cache, carry
  )
  is_last = lax.div(split + 1, jnp.int32(splits))  # 1 or 0
  num_trees = is_last * is_live
  num_trees *= lax.div(jnp.int32(end_tree + (tile_tree - 1)), tile_tree)
  acc, row_max, row_sum = lax.fori_loop(0, num_trees, attend_tree, carry)

  is_row = row < num_rows
  safe = jnp.where(row_sum == 0.0, 1.0, row_sum)
  if splits > 1 or starts_ref is not None:
    is_row = row < end_row  # what does not count is zero elsewhere
  elif counts_ref is not None:
    safe = jnp.where(row < end_row, safe, jnp.inf)
  out = (acc / safe[:, None]).astype(out_ref.dtype)
  at = index_in_q(row)
  _store_rows(out_ref, (split, place), at, out, is_row)
  if lse_ref is not None:
    # A program without a key has row_max = _LOWEST, hence no weight.
    lse = row_max + jnp.log2(safe)
    plgpu.store(lse_ref.at[split, place, at], lse, mask=is_row)
  elif starts_ref is not None:
    # The last row's programs write the zeros behind it: those of its heads.
    num_left = (out_ref.shape[2] // num_heads - first - end_tree) * group
    num_left *= lax.div(b + 1, jnp.int32(starts_ref.shape[0]))  # 1 or 0

    def write_zeros(index, _):
      left = (index * num_tiles + tile) * tile_rows
      left += jnp.arange(tile_rows, dtype=jnp.int32)
      zeros = jnp.zeros((tile_rows, head_dim), out_ref.dtype)
      at = index_in_q(end_row + left)
      _store_rows(out_ref, (split, place), at, zeros, left < num_left)

    step = num_tiles * tile_rows
    num_steps = lax.div(num_left + (step - 1), jnp.int32(step))
    lax.fori_loop(0, num_steps, write_zeros, None)


def _merge_kernel(
  parts_ref,  # float32 [splits, batch, q_len * num_heads, head_dim], or flat
  lse_ref,  # float32, as parts_ref without its channels; base 2
  counts_ref,  # int32 [batch], or None
  starts_ref,  # int32 [batch], or None
  out_ref,  # [1, batch, q_len * num_heads, head_dim], or flat
  *,
  num_heads,
):
  tile, b = pl.program_id(0), pl.program_id(1)
  splits, _, num_rows, head_dim = parts_ref.shape
  row = tile * _MERGE_ROWS + jnp.arange(_MERGE_ROWS, dtype=jnp.int32)
  if counts_ref is None:
    end_row = num_rows
  elif starts_ref is None:
    end_row = jnp.minimum(counts_ref[b] * num_heads, num_rows)
  else:
    last = counts_ref.shape[0] - 1
    end_row = (starts_ref[last] + counts_ref[last]) * num_heads
  near = jnp.minimum(row, jnp.maximum(end_row - 1, 0))
  # Unrolled, so that all loads are under way together.
  lses = [lse_ref[split, b, near] for split in range(splits)]
  top = functools.reduce(jnp.maximum, lses)
  total = jnp.zeros((_MERGE_ROWS,), jnp.float32)
  acc = jnp.zeros((_MERGE_ROWS, head_dim), jnp.float32)
  for split, lse in enumerate(lses):
    weight = jnp.exp2(lse - top)
    total += weight
    acc += weight[:, None] * parts_ref[split, b, near, :]
  out = acc / total[:, None]
  if counts_ref is not None:  # the parts past the count were never written
    out = jnp.where((row < end_row)[:, None], out, 0.0)
  out = out.astype(out_ref.dtype)
  _store_rows(out_ref, (0, b), row, out, row < num_rows)


def _store_rows(ref, outer, row, values, is_row):
  """ref[*outer, row, :] = values where is_row; by arrays, never slices.

  The interpreter has no masked store that mixes the two.
  """
  channel = jnp.arange(values.shape[1], dtype=jnp.int32)[None, :]
  row, channel, is_row = (
    jnp.broadcast_to(x, values.shape)
    for x in (row[:, None], channel, is_row[:, None])
  )
  plgpu.store(ref.at[(*outer, row, channel)], values, mask=is_row)
