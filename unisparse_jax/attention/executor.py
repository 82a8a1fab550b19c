"""Attention restricted to a `BlockMask`, blocks and columns together."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import checks, dispatch
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
    out, lse = merge((out, lse), column_attention(q, k, v, mask, scale=scale))
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


def column_attention(q, k, v, mask: block_mask.BlockMask, *, scale=None):
  """Attention over a mask's columns alone, without those its blocks hold.

  Each head's columns are gathered once into a compact array. A key whose block
  is listed for the row is left out here, so `merge` counts it once.

  Args:
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    v: as k.
    mask: a mask with columns.
    scale: softmax scale; default head_dim ** -0.5.

  Returns:
    (out, lse) as of `sparse_attention`.
  """
  grid, columns = mask.grid, mask.columns
  assert columns is not None, "the caller checks that there are columns"
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  batch, q_len, num_heads, head_dim = q.shape
  num_units = (
    mask.num_mask_heads
    * k.shape[2]
    // math.gcd(mask.num_mask_heads, k.shape[2])
  )
  to_units = functools.partial(_spread_heads, num_units=num_units)
  # [batch, units, max_columns]
  positions = to_units(columns.column_indices, axis=1)
  counts = to_units(columns.num_columns, axis=1)
  is_listed = to_units(mask.to_dense(), axis=1)

  def gather(x):  # [batch, kv_len, num_kv_heads, d] -> [batch, units, cols, d]
    by_unit = to_units(jnp.moveaxis(x, 2, 1), axis=1)
    return jnp.take_along_axis(by_unit, positions[..., None], axis=2)

  k_columns, v_columns = gather(k), gather(v)
  slot = lax.broadcasted_iota(jnp.int32, positions.shape, 2)
  is_valid = (slot < counts[..., None]) & (
    positions < grid.kv_len[:, None, None]
  )

  pad = grid.num_q_blocks * grid.block_q - q_len
  # [num_q_blocks, batch, units, group, block_q, head_dim]
  q_blocks = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  q_blocks = q_blocks.reshape(
    batch, grid.num_q_blocks, grid.block_q, num_units, -1, head_dim
  )
  q_blocks = jnp.transpose(q_blocks, (1, 0, 3, 4, 2, 5))

  @jax.checkpoint
  def attend_block(operands):
    q_block, index = operands
    # A row's own blocks hold these columns already: [batch, units, columns]
    in_block = jnp.take_along_axis(
      is_listed[:, :, index], positions // grid.block_kv, axis=-1
    )
    visible = (is_valid & ~in_block)[:, :, None, :]
    if grid.causal:
      row = jnp.arange(grid.block_q, dtype=jnp.int32)[None, :]
      row += grid.q_offset[:, None] + index * grid.block_q
      visible &= positions[:, :, None, :] <= row[:, None, :, None]
    visible = visible[:, :, None]  # over the heads of a unit
    attn_logits = scale * jnp.einsum(
      "bugqd,bucd->bugqc",
      q_block,
      k_columns,
      preferred_element_type=jnp.float32,
    )
    attn_logits = jnp.where(visible, attn_logits, -1e30)
    top = lax.stop_gradient(attn_logits.max(-1, keepdims=True))
    p = jnp.where(visible, jnp.exp(attn_logits - top), 0.0)
    total = p.sum(-1)
    safe = jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum(
      "bugqc,bucd->bugqd",
      p.astype(v.dtype),
      v_columns,
      preferred_element_type=jnp.float32,
    )
    lse = jnp.where(total == 0.0, -jnp.inf, top[..., 0] + jnp.log(safe))
    return (out / safe[..., None]).astype(q.dtype), lse

  indices = jnp.arange(grid.num_q_blocks, dtype=jnp.int32)
  out, lse = lax.map(attend_block, (q_blocks, indices))
  # [num_q_blocks, batch, units, group, block_q, ..] to [batch, q_len, heads]
  out = jnp.transpose(out, (1, 0, 4, 2, 3, 5)).reshape(
    batch, -1, num_heads, head_dim
  )
  lse = jnp.transpose(lse, (1, 0, 4, 2, 3)).reshape(batch, -1, num_heads)
  return out[:, :q_len], lse[:, :q_len]


def _spread_heads(x, *, num_units, axis):
  """Repeats the heads of an array so that there is one a unit."""
  return jnp.repeat(x, num_units // x.shape[axis], axis=axis)
