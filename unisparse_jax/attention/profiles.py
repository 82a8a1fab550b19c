# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows over all keys, and masks made from it.

Several methods look at some rows only. They add their probabilities up along
columns (one key for all queries) and along slashes (one distance between query
and key), and keep what is large.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels import checks
from unisparse_jax.attention import block_mask


def num_queries(grid: block_mask.BlockGrid) -> Int[Array, " batch"]:
  """Queries of each batch row that are no padding, at least 1.

  A causal query at or past `kv_len` is padding; a bidirectional one never is.
  """
  if not grid.causal:
    return jnp.full((grid.batch,), grid.q_len, jnp.int32)
  return jnp.clip(grid.kv_len - grid.q_offset, 1, grid.q_len)


def num_keys(grid: block_mask.BlockGrid) -> Int[Array, " batch"]:
  """Keys of each batch row that some query sees."""
  if not grid.causal:
    return grid.kv_len
  return jnp.minimum(grid.kv_len, grid.q_offset + num_queries(grid))


def attention_of_rows(
  q: Float[Array, "batch q_len num_heads head_dim"],
  k: Float[Array, "batch kv_len num_kv_heads head_dim"],
  grid: block_mask.BlockGrid,
  rows: Int[Array, "batch num_strips rows_per_strip"],
  is_counted: Bool[Array, "batch num_strips rows_per_strip"],
  *,
  scale: float | None = None,
) -> tuple[
  Float[Array, "batch num_heads kv_len"], Float[Array, "batch num_heads kv_len"]
]:
  """Softmax rows of some queries, added up along columns and along slashes.

  Args:
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    grid: causality and lengths.
    rows: int32, query indices; a strip's are consecutive, or its slashes mean
      nothing.
    is_counted: which of the rows enter the sums; others may be out of range.
    scale: softmax scale; default head_dim ** -0.5.

  Returns:
    columns: float32 [batch, num_heads, kv_len], sum over the rows of the
      probability of each key.
    slashes: float32 [batch, num_heads, kv_len], sum over the rows of the
      probability of the key that lies d before the query, by d. Keys after
      the query enter no slash.

  Memory: one strip of the query heads of one key head, rows_per_strip x kv_len.
  """
  checks.check_qkv(q, k, None)
  checks.check_scale(scale)
  logit_scale = q.shape[-1] ** -0.5 if scale is None else scale
  batch, _, num_heads, head_dim = q.shape
  capacity, num_kv_heads = k.shape[1:3]
  num_strips, per_strip = rows.shape[1:]
  index = jnp.clip(rows, 0, grid.q_len - 1).reshape(batch, -1)
  picked = jnp.take_along_axis(q, index[:, :, None, None], axis=1)
  # [batch, num_kv_heads, num_strips, group, per_strip, head_dim]
  picked = picked.reshape(
    batch, num_strips, per_strip, num_kv_heads, -1, head_dim
  )
  picked = jnp.transpose(picked, (0, 3, 1, 4, 2, 5))
  positions = rows + grid.q_offset[:, None, None]
  key = jnp.arange(capacity, dtype=jnp.int32)

  def add_strip(total, strip, keys, kv_len):
    queries, position, counted = strip
    attn_logits = logit_scale * jnp.einsum(
      "grd,kd->grk", queries, keys, preferred_element_type=jnp.float32
    )
    limit = jnp.full_like(position, kv_len)
    if grid.causal:
      limit = jnp.minimum(limit, position + 1)
    visible = (key[None, :] < limit[:, None]) & counted[:, None]
    visible = visible[None]
    attn_logits = jnp.where(visible, attn_logits, -jnp.inf)
    top = attn_logits.max(-1, keepdims=True)
    p = jnp.exp(attn_logits - jnp.where(jnp.isneginf(top), 0.0, top))
    mass = p.sum(-1, keepdims=True)
    p /= jnp.where(mass == 0.0, 1.0, mass)
    columns, slashes = total
    return (columns + p.sum(1), slashes + _slash_sums(p, position[0])), None

  def one_head(task):
    b, kv_head = task // num_kv_heads, task % num_kv_heads
    zeros = jnp.zeros((picked.shape[3], capacity), jnp.float32)
    total, _ = lax.scan(
      functools.partial(
        add_strip, keys=k[b, :, kv_head], kv_len=grid.kv_len[b]
      ),
      (zeros, zeros),
      (picked[b, kv_head], positions[b], is_counted[b]),
    )
    return total

  tasks = jnp.arange(batch * num_kv_heads, dtype=jnp.int32)
  sums = lax.map(one_head, tasks)
  columns, slashes = (x.reshape(batch, num_heads, capacity) for x in sums)
  return columns, slashes


def columns_of_rows(
  q: Float[Array, "batch q_len num_heads head_dim"],
  k: Float[Array, "batch kv_len num_kv_heads head_dim"],
  grid: block_mask.BlockGrid,
  rows: Int[Array, "batch num_rows"],
  is_counted: Bool[Array, "batch num_rows"],
  *,
  scale: float | None = None,
) -> Float[Array, "batch num_heads kv_len"]:
  """The columns of `attention_of_rows` alone, by one op with kernels.

  Args:
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    grid: causality and lengths.
    rows: int32, query indices; ascending is fastest.
    is_counted: which of the rows enter the sums; others may be out of range.
    scale: softmax scale; default head_dim ** -0.5.

  Returns:
    float32 [batch, num_heads, kv_len], sum over the rows of the probability of
    each key.
  """
  index = jnp.clip(rows, 0, grid.q_len - 1)
  # Without causality the op asks the sign of a position alone.
  positions = rows + grid.q_offset[:, None] if grid.causal else index
  return pallas_kernels.column_score_sampling(
    jnp.take_along_axis(q, index[:, :, None, None], axis=1),
    k,
    jnp.where(is_counted, positions, -1),
    causal=grid.causal,
    scale=scale,
    kv_len=grid.kv_len,
  )


def last_rows(
  grid: block_mask.BlockGrid, count: int
) -> tuple[Int[Array, "batch 1 count"], Bool[Array, "batch 1 count"]]:
  """The last `count` queries that are no padding, as one strip of rows."""
  end = num_queries(grid)[:, None, None]
  rows = end - count + jnp.arange(count, dtype=jnp.int32)[None, None, :]
  return rows, rows >= 0


def touched_by_slashes(
  grid: block_mask.BlockGrid,
  is_kept: Bool[Array, "batch num_heads kv_len"],
) -> Bool[Array, "batch num_heads num_q_blocks num_kv_blocks"]:
  """Blocks that hold a pair of a query and a key at a kept distance.

  Args:
    grid: the blocks.
    is_kept: by distance from a query back to a key, in tokens.

  Returns:
    bool [batch, num_heads, num_q_blocks, num_kv_blocks].
  """
  first, last, key = grid.bounds()
  return _any_in_range(is_kept, first - key - grid.block_kv + 1, last - key)


def touched_by_block_slashes(
  grid: block_mask.BlockGrid,
  is_kept: Bool[Array, "batch num_heads num_kv_blocks"],
) -> Bool[Array, "batch num_heads num_q_blocks num_kv_blocks"]:
  """Blocks at a kept distance, in key blocks, from the row's own.

  Args:
    grid: the blocks.
    is_kept: by distance in key blocks. A row that lies in several key blocks
      keeps what is at that distance from any of them.

  Returns:
    bool [batch, num_heads, num_q_blocks, num_kv_blocks].
  """
  first, last, key = (x // grid.block_kv for x in grid.bounds())
  return _any_in_range(is_kept, first - key, last - key)


def sum_blocks(
  profile: Float[Array, "batch num_heads kv_len"], block: int
) -> Float[Array, "batch num_heads num_blocks"]:
  """Sums of consecutive `block` entries; the last may have fewer."""
  pad = -profile.shape[-1] % block
  profile = jnp.pad(profile, ((0, 0), (0, 0), (0, pad)))
  return profile.reshape(*profile.shape[:2], -1, block).sum(-1)


def _slash_sums(p, first_position):
  """sum_t p[:, t, first_position + t - d] for every d >= 0: [group, keys]."""
  group, num_rows, num_keys = p.shape
  # Row t of the mirrored matrix moves t to the right, by a change of pitch:
  # entry (t, m) of a matrix with pitch n + 1 is (t, m + t) of one with pitch n.
  mirrored = jnp.pad(p[..., ::-1], ((0, 0), (0, 0), (0, num_rows)))
  pitch = num_keys + num_rows - 1
  skewed = mirrored.reshape(group, -1)[:, : num_rows * pitch]
  sums = skewed.reshape(group, num_rows, pitch).sum(1)
  # Distance d stands at d - first_position + num_keys - 1.
  sums = jnp.pad(sums, ((0, 0), (0, num_keys + num_rows)))
  return lax.dynamic_slice(
    sums, (jnp.int32(0), num_keys - 1 - first_position), (group, num_keys)
  )


def _any_in_range(is_kept, low, high):
  """Whether is_kept[b, h] has a True in low..high (inclusive), [b, q, kv]."""
  num_items = is_kept.shape[-1]
  # [batch, num_heads, 1, num_items + 1]: how many stand before.
  before = jnp.cumsum(is_kept, axis=-1, dtype=jnp.int32)
  before = jnp.pad(before, ((0, 0), (0, 0), (1, 0)))[:, :, None, :]

  def count(x):
    index = jnp.clip(x, 0, num_items)[:, None]
    return jnp.take_along_axis(before, index, axis=-1)

  return count(high + 1) > count(low)
