# SPDX-License-Identifier: Apache-2.0
"""How much of dense attention a mask keeps; never a q_len x kv_len array."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import checks
from unisparse_jax.attention import block_mask


def density(
  mask: block_mask.BlockMask,
) -> Float[Array, "batch num_mask_heads"]:
  """Kept blocks over blocks that attention can reach, in [0, 1]; no columns."""
  kept = mask.num_kv_blocks.sum(-1).astype(jnp.float32)
  reachable = mask.grid.admissible().sum((1, 2)).astype(jnp.float32)
  return kept / jnp.maximum(reachable, 1.0)[:, None]


def nominal_density(
  mask: block_mask.BlockMask,
) -> Float[Array, "batch num_mask_heads"]:
  """Kept pairs of tokens over visible pairs, columns counted one by one."""
  grid = mask.grid
  listed = mask.to_dense()
  columns = None
  if mask.columns is not None:
    columns = mask.columns.to_dense(grid.num_kv_blocks * grid.block_kv).reshape(
      *listed.shape[:2], grid.num_kv_blocks, grid.block_kv
    )

  def count_row(index):
    """Kept and visible pairs of one block of queries."""
    row = jnp.arange(grid.block_q, dtype=jnp.int32)
    query = index * grid.block_q + row
    limit = jnp.broadcast_to(grid.kv_len[:, None], (grid.batch, grid.block_q))
    if grid.causal:
      position = query[None, :] + grid.q_offset[:, None] + 1
      limit = jnp.minimum(limit, position)
    limit = jnp.where((query < grid.q_len)[None, :], limit, 0)
    first = jnp.arange(grid.num_kv_blocks, dtype=jnp.int32) * grid.block_kv
    # Visible keys of each block for each query: [batch, block_q, blocks]
    visible = jnp.clip(
      limit[:, :, None] - first[None, None, :], 0, grid.block_kv
    )
    visible_blocks = visible.sum(1).astype(jnp.float32)[:, None]
    is_listed = listed[:, :, index].astype(jnp.float32)
    kept = (visible_blocks * is_listed).sum(-1)
    if columns is not None:
      # Columns of a block that a query sees, by how many of its keys it sees.
      running = jnp.cumsum(columns, axis=-1, dtype=jnp.int32)
      running = jnp.pad(running, ((0, 0), (0, 0), (0, 0), (1, 0)))
      seen = jnp.take_along_axis(
        running[:, :, None], visible[:, None, :, :, None], axis=-1
      )[..., 0].sum(2)
      kept += (seen.astype(jnp.float32) * (1.0 - is_listed)).sum(-1)
    return kept, visible_blocks.sum(-1)

  kept, visible = lax.map(
    count_row, jnp.arange(grid.num_q_blocks, dtype=jnp.int32)
  )
  return kept.sum(0) / jnp.maximum(visible.sum(0), 1.0)


def recall(
  q: Float[Array, "batch q_len num_heads head_dim"],
  k: Float[Array, "batch kv_len num_kv_heads head_dim"],
  mask: block_mask.BlockMask,
  *,
  scale: float | None = None,
) -> Float[Array, "batch q_len num_heads"]:
  """Dense softmax mass that each query's kept keys hold, in [0, 1].

  Args:
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    mask: what is kept.
    scale: softmax scale; default head_dim ** -0.5.

  Returns:
    float32 [batch, q_len, num_heads]; 1 for queries that see no key. The
    minimum over queries is the CRA of SampleAttention (arXiv 2406.15486).
  """
  grid = mask.grid
  listed = mask.to_dense()
  is_column = (
    jnp.zeros((grid.batch, 1, grid.kv_capacity), jnp.bool_)
    if mask.columns is None
    else mask.columns.to_dense(grid.kv_capacity)
  )

  def keep_mass(probabilities, has_keys, head, index):
    mask_head = head * listed.shape[1] // q.shape[2]
    column_head = head * is_column.shape[1] // q.shape[2]
    by_key = jnp.repeat(listed[:, mask_head, index], grid.block_kv, axis=-1)[
      :, : grid.kv_capacity
    ]
    kept = by_key | is_column[:, column_head]
    mass = jnp.where(kept[:, None, :], probabilities, 0.0).sum(-1)
    return jnp.where(has_keys, mass, 1.0)

  # [num_heads, num_q_blocks, batch, block_q]
  mass = _map_dense_rows(q, k, grid, scale, keep_mass)
  mass = jnp.transpose(mass, (2, 1, 3, 0))
  return mass.reshape(grid.batch, -1, q.shape[2])[:, : grid.q_len]


def recall_from_lse(
  lse: Float[Array, "batch q_len num_heads"],
  dense_lse: Float[Array, "batch q_len num_heads"],
) -> Float[Array, "batch q_len num_heads"]:
  """`recall` from the log-sum-exps that attention returns anyway.

  A query's kept keys hold exp(lse - dense_lse) of its dense softmax: the cost
  is that of sparse attention, where `recall` costs more than dense attention.

  Args:
    lse: float32 [batch, q_len, num_heads], over the kept keys.
    dense_lse: over all keys, of the same back end: products in bfloat16 differ
      between back ends by about 1e-3 in the lse.

  Returns:
    float32 [batch, q_len, num_heads], at most 1; 1 for queries that see no key.
  """
  has_keys = jnp.isfinite(dense_lse)
  share = jnp.exp(lse - jnp.where(has_keys, dense_lse, 0.0))
  return jnp.where(has_keys, jnp.minimum(share, 1.0), 1.0)


def block_mass(
  q: Float[Array, "batch q_len num_heads head_dim"],
  k: Float[Array, "batch kv_len num_kv_heads head_dim"],
  grid: block_mask.BlockGrid,
  *,
  scale: float | None = None,
) -> Float[Array, "batch num_heads num_q_blocks num_kv_blocks"]:
  """Dense softmax mass of each block, mean over the queries of its row.

  Args:
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    grid: the blocks.
    scale: softmax scale; default head_dim ** -0.5.

  Returns:
    float32 [batch, num_heads, num_q_blocks, num_kv_blocks]; rows sum to 1.
  """
  missing = grid.num_kv_blocks * grid.block_kv - grid.kv_capacity

  def add_up(probabilities, has_keys, head, index):
    del head, index
    p = jnp.pad(probabilities, ((0, 0), (0, 0), (0, missing)))
    p = p.reshape(grid.batch, grid.block_q, grid.num_kv_blocks, -1)
    rows = jnp.maximum(has_keys.sum(-1), 1).astype(jnp.float32)
    return p.sum((1, 3)) / rows[:, None]

  mass = _map_dense_rows(q, k, grid, scale, add_up)
  return jnp.transpose(mass, (2, 0, 1, 3))


def output_error(
  out: Float[Array, "..."], reference: Float[Array, "..."]
) -> dict[str, Float[Array, ""]]:
  """Distance of an attention output from a reference of the same shape.

  Args:
    out: the output.
    reference: what it should be.

  Returns:
    "relative_l1": sum |out - ref| / sum |ref|; "relative_l2": the same in
    2-norm; "cosine": of the two as vectors; "rmse".
  """
  checks.require(
    out.shape == reference.shape,
    "out",
    "have the reference's shape",
    out.shape,
    str(reference.shape),
  )
  out, reference = (x.astype(jnp.float32).ravel() for x in (out, reference))
  difference = out - reference
  norm = jnp.linalg.norm(reference)
  return {
    "relative_l1": jnp.abs(difference).sum() / jnp.abs(reference).sum(),
    "relative_l2": jnp.linalg.norm(difference) / norm,
    "cosine": jnp.vdot(out, reference) / (jnp.linalg.norm(out) * norm),
    "rmse": jnp.sqrt(jnp.mean(jnp.square(difference))),
  }


def _map_dense_rows(q, k, grid, scale, reduce_rows):
  """Dense probabilities, one head and one block of queries at a time.

  `reduce_rows` takes (probabilities [batch, block_q, kv_capacity], which
  queries see a key [batch, block_q], head, block). Its results are stacked
  [num_heads, num_q_blocks, ...].
  """
  checks.check_qkv(q, k, None)
  checks.check_scale(scale)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  num_heads, per_kv_head = q.shape[2], q.shape[2] // k.shape[2]
  pad = grid.num_q_blocks * grid.block_q - grid.q_len
  q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  key = jnp.arange(grid.kv_capacity, dtype=jnp.int32)[None, None, :]

  def one_block(task):
    head, index = task // grid.num_q_blocks, task % grid.num_q_blocks
    q_block = lax.dynamic_slice_in_dim(
      q[:, :, head], index * grid.block_q, grid.block_q, axis=1
    )
    attn_logits = scale * jnp.einsum(
      "bqd,bkd->bqk",
      q_block,
      k[:, :, head // per_kv_head],
      preferred_element_type=jnp.float32,
    )
    query = index * grid.block_q + jnp.arange(grid.block_q, dtype=jnp.int32)
    limit = jnp.broadcast_to(grid.kv_len[:, None], (grid.batch, grid.block_q))
    if grid.causal:
      limit = jnp.minimum(limit, query[None, :] + grid.q_offset[:, None] + 1)
    limit = jnp.where((query < grid.q_len)[None, :], limit, 0)
    visible = key < limit[:, :, None]
    p = jax.nn.softmax(jnp.where(visible, attn_logits, -1e30), axis=-1)
    p = jnp.where(visible, p, 0.0)
    return reduce_rows(p, limit > 0, head, index)

  tasks = jnp.arange(num_heads * grid.num_q_blocks, dtype=jnp.int32)
  rows = lax.map(one_block, tasks)
  return rows.reshape(num_heads, grid.num_q_blocks, *rows.shape[1:])
