# SPDX-License-Identifier: Apache-2.0
"""Attention restricted to a `BlockMask`, blocks and columns together."""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import checks, dispatch
from pallas_kernels.block_sparse_attention import columns as columns_op
from unisparse_jax.attention import block_mask


def sparse_attention(
  q: Float[Array, "batch q_len num_heads head_dim"],
  k: Float[Array, "batch kv_len num_kv_heads head_dim"],
  v: Float[Array, "batch kv_len num_kv_heads head_dim"],
  mask: block_mask.BlockMask,
  *,
  scale: float | None = None,
  return_lse: bool = False,
  implementation: dispatch.Implementation = None,
):
  """Softmax attention over what a mask keeps.

  out[i] = sum_j softmax_j(scale * <q_i, k_j>) v_j, with j over the kept keys.

  Args:
    q: [batch, q_len, num_heads, head_dim]; float32, bfloat16 or float16.
    k: [batch, kv_len, num_kv_heads, head_dim], dtype of q.
    v: as k.
    mask: kept blocks and columns, made for arrays of these lengths.
    scale: softmax scale, dimensionless; default head_dim ** -0.5.
    return_lse: also return the log-sum-exp, for `merge`.
    implementation: back end of `pallas_kernels.block_sparse_attention`.

  Returns:
    [batch, q_len, num_heads, head_dim], dtype of q; rows with no kept key are
    0. With `return_lse` also float32 [batch, q_len, num_heads], natural log,
    -inf for rows with no kept key.

  Raises:
    ValueError: shapes, dtypes or the mask's sizes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.

  Cost: O(density * q_len * kv_len * head_dim) per head; no [q_len, kv_len]
    array.
  """
  checks.check_qkv(q, k, v)
  grid = mask.grid
  checks.require(
    q.shape[:2] == (grid.batch, grid.q_len),
    "mask",
    "be made for q's [batch, q_len]",
    (grid.batch, grid.q_len),
    str(q.shape[:2]),
  )
  checks.require(
    k.shape[1] == grid.kv_capacity,
    "mask",
    "be made for k's length",
    grid.kv_capacity,
    str(k.shape[1]),
  )
  out, lse = pallas_kernels.block_sparse_attention(
    q,
    k,
    v,
    mask.kv_block_indices,
    mask.num_kv_blocks,
    block_q=grid.block_q,
    block_kv=grid.block_kv,
    causal=grid.causal,
    scale=scale,
    q_offset=grid.q_offset,
    kv_len=grid.kv_len,
    implementation=implementation,
  )
  if mask.columns is not None:
    by_columns = column_attention(
      q, k, v, mask, scale=scale, implementation=implementation
    )
    out, lse = merge((out, lse), by_columns)
  return (out, lse) if return_lse else out


def merge(first, second):
  """Attention over two disjoint sets of keys from the attention over each.

  Args:
    first: (out, lse), [batch, q_len, num_heads, head_dim] and float32
      [batch, q_len, num_heads].
    second: the same over other keys.

  Returns:
    (out, lse) over both sets; 0 and -inf where neither has a key.
  """
  (out_a, lse_a), (out_b, lse_b) = first, second
  top = jnp.maximum(lse_a, lse_b)
  top = jnp.where(jnp.isneginf(top), 0.0, top)
  # exp(-inf - finite) is 0, with a gradient of 0.
  weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
  total = weight_a + weight_b
  is_empty = total == 0.0
  safe = jnp.where(is_empty, 1.0, total)
  out = (
    out_a.astype(jnp.float32) * (weight_a / safe)[..., None]
    + out_b.astype(jnp.float32) * (weight_b / safe)[..., None]
  )
  lse = jnp.where(is_empty, -jnp.inf, top + jnp.log(safe))
  return out.astype(out_a.dtype), lse


def column_attention(
  q, k, v, mask: block_mask.BlockMask, *, scale=None, implementation=None
):
  """Attention over a mask's columns alone, without those its blocks hold.

  Each head's columns are gathered once into a compact array. A key whose block
  is listed for the row is left out here, so `merge` counts it once.

  Args:
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    v: as k.
    mask: a mask with columns.
    scale: softmax scale; default head_dim ** -0.5.
    implementation: back end; "xla" where the named one has no columns.

  Returns:
    (out, lse) as of `sparse_attention`.
  """
  grid, columns = mask.grid, mask.columns
  assert columns is not None, "the caller checks that there are columns"
  num_units = math.lcm(mask.num_mask_heads, k.shape[2])
  to_units = functools.partial(_spread_heads, num_units=num_units)
  # [batch, units, max_columns]
  positions = to_units(columns.column_indices, axis=1)
  counts = to_units(columns.num_columns, axis=1)

  def gather(x):  # [batch, kv_len, num_kv_heads, d] -> [batch, cols, units, d]
    by_unit = to_units(x, axis=2)
    return jnp.take_along_axis(
      by_unit, jnp.moveaxis(positions, 1, 2)[..., None], axis=1
    )

  slot = lax.broadcasted_iota(jnp.int32, positions.shape, 2)
  is_valid = (slot < counts[..., None]) & (
    positions < grid.kv_len[:, None, None]
  )
  # A row's own blocks hold these columns already.
  in_block = jnp.take_along_axis(
    to_units(mask.to_dense(), axis=1),
    (positions // grid.block_kv)[:, :, None, :],
    axis=-1,
  )
  is_seen = is_valid[:, :, None, :] & ~in_block
  return columns_op.column_attention(
    q,
    gather(k),
    gather(v),
    jnp.where(is_seen, positions[:, :, None, :], columns_op.NEVER),
    block_q=grid.block_q,
    causal=grid.causal,
    scale=scale,
    q_offset=grid.q_offset,
    implementation=columns_op.with_columns(implementation),
  )


def _spread_heads(x, *, num_units, axis):
  """Repeats the heads of an array so that there is one a unit."""
  return jnp.repeat(x, num_units // x.shape[axis], axis=axis)
