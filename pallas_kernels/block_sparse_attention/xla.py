# SPDX-License-Identifier: Apache-2.0
"""Any-device back end: a loop over query tiles, each over its own block list.

A tile is one block of queries of all the heads that share both a mask head and
a key head, so that grouped-query heads share each key block that is read. The
inner loop runs as often as the tile's list is long (`lax.fori_loop` with a
dynamic bound), hence time follows the number of kept blocks and memory is that
of q, k, v and out.

The list's first blocks, which need a per-token mask, are read with a mask,
together with as many others as leave whole steps; the rest are read `step_kv`
keys at once without one. On a CPU that head is one step, compiled for several
lengths; an accelerator, which runs many tiles abreast, would run all of these,
and reads the head one block at a time.

Measured on 2 idle CPU cores, float32, 6 heads on 2 key heads of 64, 8K tokens,
random masks with key blocks of 64, ms by (blocks of a free step, lengths of the
head's step); dense attention by this loop takes 210:

  density   8, one at a time   8, 2 to 8 by 2   8, 2 to 9   16, 2 to 16 by 2
  0.247     72                 70               71          65
  0.150     50                 50               45          46
  0.089     35                 37               35          34

About 13 ms of each is for starting the operations of 128 tiles. Two loops over
half of the tiles each, which the runtime might have run side by side, took 2 to
10% longer. Masking every step took 15 to 25% longer.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

_BACKWARD_STEP = 2  # blocks that dq reads at once, all masked
_TILES_ABREAST = 128  # on accelerators
_MASKED = -1e30  # finite: a row of masked logits must not make NaN


def block_sparse_attention(
  q,  # [batch, q_len, num_heads, head_dim]
  k,  # [batch, kv_len, num_kv_heads, head_dim]
  v,  # [batch, kv_len, num_kv_heads, head_dim]
  kv_block_indices,  # int32 [batch, num_mask_heads, num_q_blocks, max_blocks]
  num_kv_blocks,  # int32 [batch, num_mask_heads, num_q_blocks]
  q_offset,  # int32 [batch]
  kv_len,  # int32 [batch]
  *,
  block_q,
  block_kv,
  causal,
  scale,
  step_kv=1024,
) -> tuple[jax.Array, jax.Array]:
  """See `api.block_sparse_attention`; step_kv: keys read without a mask."""
  settings = (block_q, block_kv, causal, scale, max(1, step_kv // block_kv))
  return _attention(
    q, k, v, kv_block_indices, num_kv_blocks, q_offset, kv_len, settings
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(q, k, v, indices, counts, q_offset, kv_len, settings):
  return _forward(q, k, v, indices, counts, q_offset, kv_len, settings)


def _attention_fwd(q, k, v, indices, counts, q_offset, kv_len, settings):
  out, lse = _forward(q, k, v, indices, counts, q_offset, kv_len, settings)
  return (out, lse), (q, k, v, indices, counts, q_offset, kv_len, out, lse)


def _attention_bwd(settings, residuals, cotangents):
  dq, dk, dv = _backward(residuals, cotangents, settings)
  return dq, dk, dv, None, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Layout:
  """Sizes of the tiling; a unit is the heads of one mask and key head."""

  def __init__(self, q, k, indices, settings):
    self.block_q, self.block_kv, self.causal, self.scale, step = settings
    self.batch, self.q_len, self.num_heads, self.head_dim = q.shape
    self.kv_len, self.num_kv_heads = k.shape[1:3]
    self.num_mask_heads = indices.shape[1]
    self.group = math.gcd(
      self.num_heads // self.num_kv_heads, self.num_heads // self.num_mask_heads
    )
    self.units = self.num_heads // self.group
    self.num_q_blocks = math.ceil(self.q_len / self.block_q)
    self.num_kv_blocks = math.ceil(self.kv_len / self.block_kv)
    # A step reads no more slots than a list has.
    self.step = min(step, self.num_kv_blocks, indices.shape[3])
    self.head_steps = (1,)
    if jax.default_backend() == "cpu" and self.step > 1:
      self.head_steps = tuple(range(2, self.step + 1, 2))
    self.backward_step = min(_BACKWARD_STEP, self.num_kv_blocks)

  def to_q_tiles(self, x):
    """[batch, q_len, num_heads, ...] to [batch * units * q blocks, rows, ...].

    A tile's rows are group-major: head in the group, then query.
    """
    rest = x.shape[3:]
    pad = self.num_q_blocks * self.block_q - self.q_len
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    # [batch, q blocks, block_q, units, group, ...]
    x = x.reshape(
      self.batch, self.num_q_blocks, self.block_q, self.units, self.group, *rest
    )
    x = jnp.moveaxis(x, (3, 4), (1, 3))
    return x.reshape(-1, self.group * self.block_q, *rest)

  def from_q_tiles(self, x):
    """Inverse of `to_q_tiles`."""
    rest = x.shape[2:]
    x = x.reshape(
      self.batch, self.units, self.num_q_blocks, self.group, self.block_q, *rest
    )
    x = jnp.moveaxis(x, (1, 3), (3, 4))
    x = x.reshape(self.batch, -1, self.num_heads, *rest)
    return x[:, : self.q_len]

  def to_kv_blocks(self, x):
    """[batch, kv_len, heads, d] to [batch * heads * blocks, block_kv, d]."""
    pad = self.num_kv_blocks * self.block_kv - self.kv_len
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    x = x.reshape(
      self.batch, self.num_kv_blocks, self.block_kv, self.num_kv_heads, -1
    )
    return jnp.moveaxis(x, 3, 1).reshape(-1, self.block_kv, self.head_dim)

  def from_kv_blocks(self, x):
    """Inverse of `to_kv_blocks`."""
    x = x.reshape(
      self.batch, self.num_kv_heads, self.num_kv_blocks, self.block_kv, -1
    )
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(self.batch, -1, self.num_kv_heads, self.head_dim)[
      :, : self.kv_len
    ]

  def split_tile(self, tile, num_blocks):
    """Tile number to (batch, unit, block), and its first key block's number."""
    batch_index = tile // (self.units * num_blocks)
    unit = tile // num_blocks % self.units
    kv_head = unit * self.num_kv_heads // self.units
    first_kv = (batch_index * self.num_kv_heads + kv_head) * self.num_kv_blocks
    return batch_index, unit, tile % num_blocks, first_kv

  def lists_by_unit(self, lists):
    """[batch, num_mask_heads, blocks, ...] to [batch * units * blocks, ...]."""
    lists = jnp.repeat(lists, self.units // self.num_mask_heads, axis=1)
    return lists.reshape(-1, *lists.shape[3:])

  def num_masked(self, block_list, length, first_position, kv_len):
    """Length of the list's shortest head that holds all blocks to be masked.

    Args:
      block_list: int32 [slots].
      length: blocks in the list.
      first_position: absolute position of the tile's first query.
      kv_len: number of valid keys.
    """
    all_visible = kv_len
    if self.causal:
      all_visible = jnp.minimum(all_visible, first_position + 1)
    slot = jnp.arange(block_list.shape[0], dtype=jnp.int32)
    needs_mask = (block_list + 1) * self.block_kv > all_visible
    return jnp.max(jnp.where(needs_mask & (slot < length), slot + 1, 0))

  def is_visible(self, q_positions, kv_positions, kv_len):
    """bool [rows, keys]: which pairs of absolute positions may attend."""
    visible = (kv_positions < kv_len)[None, :]
    if self.causal:
      visible &= kv_positions[None, :] <= q_positions[:, None]
    return visible


def _forward(q, k, v, indices, counts, q_offset, kv_len, settings):
  tiling = _Layout(q, k, indices, settings)
  rows = tiling.group * tiling.block_q
  k_blocks, v_blocks = tiling.to_kv_blocks(k), tiling.to_kv_blocks(v)
  # Room so that a step may read past the last entry.
  pad = ((0, 0),) * 3 + ((0, tiling.head_steps[-1] - 1),)
  lists = tiling.lists_by_unit(jnp.pad(indices, pad))
  list_lengths = tiling.lists_by_unit(counts)
  # Folded into q once, where that costs no digits: in bfloat16 it moved logits
  # of 1e4 by 16.
  is_folded = q.dtype == jnp.float32
  q_tiles = tiling.to_q_tiles(q * tiling.scale if is_folded else q)

  def attend_tile(operands):
    q_tile, block_list, length, tile = operands
    b, _, q_block, first_kv = tiling.split_tile(tile, tiling.num_q_blocks)
    first_position = q_offset[b] + q_block * tiling.block_q
    row = jnp.tile(jnp.arange(tiling.block_q), tiling.group)

    def attend(blocks, is_visible, carry):
      row_max, row_sum, acc = carry
      keys = blocks.size * tiling.block_kv
      k_step = k_blocks[first_kv + blocks].reshape(keys, -1)
      v_step = v_blocks[first_kv + blocks].reshape(keys, -1)
      attn_logits = _dot(q_tile, k_step, 1)
      if not is_folded:
        attn_logits *= tiling.scale
      if is_visible is not None:
        attn_logits = jnp.where(is_visible, attn_logits, _MASKED)
      new_max = jnp.maximum(row_max, attn_logits.max(-1))
      p = jnp.exp(attn_logits - new_max[:, None])
      if is_visible is not None:
        # Keeps rows without any key at a sum of 0.
        p = jnp.where(is_visible, p, 0.0)
      shrink = jnp.exp(row_max - new_max)
      acc = acc * shrink[:, None] + _dot(p.astype(v.dtype), v_step, 0)
      return new_max, row_sum * shrink + p.sum(-1), acc

    def masked_step(num_blocks, start, carry):
      blocks = lax.dynamic_slice(block_list, (start,), (num_blocks,))
      key = jnp.arange(num_blocks * tiling.block_kv)
      positions = jnp.repeat(blocks * tiling.block_kv, tiling.block_kv)
      positions += key % tiling.block_kv
      # What follows the head is read by the free steps.
      is_head = start + key // tiling.block_kv < num_first
      positions = jnp.where(is_head, positions, kv_len[b])
      is_visible = tiling.is_visible(first_position + row, positions, kv_len[b])
      return attend(blocks, is_visible, carry)

    def free_step(index, carry):
      start = num_first + index * tiling.step
      blocks = lax.dynamic_slice(block_list, (start,), (tiling.step,))
      return attend(blocks, None, carry)

    num_masked = tiling.num_masked(
      block_list, length, first_position, kv_len[b]
    )
    num_first = num_masked + (length - num_masked) % tiling.step
    carry = (
      jnp.full((rows,), _MASKED, jnp.float32),
      jnp.zeros((rows,), jnp.float32),
      jnp.zeros((rows, tiling.head_dim), jnp.float32),
    )
    most = tiling.head_steps[-1]
    num_head_steps = jnp.maximum(num_first - 1, 0) // most
    carry = lax.fori_loop(
      0,
      num_head_steps,
      lambda index, carry: masked_step(most, index * most, carry),
      carry,
    )
    last_start = num_head_steps * most
    carry = lax.switch(
      jnp.searchsorted(jnp.asarray(tiling.head_steps), num_first - last_start),
      [functools.partial(masked_step, n) for n in tiling.head_steps],
      last_start,
      carry,
    )
    num_free_steps = (length - num_first) // tiling.step
    row_max, row_sum, acc = lax.fori_loop(0, num_free_steps, free_step, carry)
    is_empty = row_sum == 0.0
    out = acc / jnp.where(is_empty, 1.0, row_sum)[:, None]
    lse = jnp.where(is_empty, -jnp.inf, row_max + jnp.log(row_sum))
    return out.astype(q.dtype), lse

  tiles = jnp.arange(q_tiles.shape[0])
  out, lse = _map_tiles(attend_tile, (q_tiles, lists, list_lengths, tiles))
  return tiling.from_q_tiles(out), tiling.from_q_tiles(lse)


def _backward(residuals, cotangents, settings):
  q, k, v, indices, counts, q_offset, kv_len, out, lse = residuals
  d_out, d_lse = cotangents
  tiling = _Layout(q, k, indices, settings)
  # d(logits) = p * (dp - delta), delta = <out, d_out> - d_lse
  delta = (
    jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - d_lse
  )
  q_tiles, do_tiles = tiling.to_q_tiles(q), tiling.to_q_tiles(d_out)
  # Rows without a key have no gradient: +inf makes their p exactly 0.
  lse_tiles = tiling.to_q_tiles(jnp.where(jnp.isneginf(lse), jnp.inf, lse))
  delta_tiles = tiling.to_q_tiles(jnp.where(jnp.isneginf(lse), 0.0, delta))
  q_side = (q_tiles, do_tiles, lse_tiles, delta_tiles)
  kv_side = (tiling.to_kv_blocks(k), tiling.to_kv_blocks(v))
  dq = _backward_q(tiling, q_side, kv_side, indices, counts, q_offset, kv_len)
  dk, dv = _backward_kv(
    tiling, q_side, kv_side, indices, counts, q_offset, kv_len
  )
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _logit_gradient(tiling, q, k, v, d_out, lse, delta, visible):
  """Probabilities and logit gradients, float32 [rows, keys] each."""
  attn_logits = _dot(q, k, 1) * tiling.scale
  p = jnp.where(visible, jnp.exp(attn_logits - lse[:, None]), 0.0)
  return p, p * (_dot(d_out, v, 1) - delta[:, None])


def _backward_q(tiling, q_side, kv_side, indices, counts, q_offset, kv_len):
  """dq: every query tile walks its own list again."""
  k_blocks, v_blocks = kv_side
  per_step = tiling.backward_step
  keys = per_step * tiling.block_kv
  rows = tiling.group * tiling.block_q
  # Room so that a step may read past the last list entry.
  pad = ((0, 0),) * (indices.ndim - 1) + ((0, per_step - 1),)
  lists = tiling.lists_by_unit(jnp.pad(indices, pad))
  list_lengths = tiling.lists_by_unit(counts)

  def tile_gradient(operands):
    q_tile, do_tile, lse, delta, block_list, length, tile = operands
    b, _, q_block, first_kv = tiling.split_tile(tile, tiling.num_q_blocks)
    row = jnp.tile(jnp.arange(tiling.block_q), tiling.group)
    q_positions = q_offset[b] + q_block * tiling.block_q + row

    def step(index, dq):
      blocks, kv_positions = _read_list(tiling, block_list, length, index)
      k_step = k_blocks[first_kv + blocks].reshape(keys, -1)
      v_step = v_blocks[first_kv + blocks].reshape(keys, -1)
      visible = tiling.is_visible(q_positions, kv_positions, kv_len[b])
      _, d_logits = _logit_gradient(
        tiling, q_tile, k_step, v_step, do_tile, lse, delta, visible
      )
      return dq + _dot(d_logits.astype(k_step.dtype), k_step, 0)

    num_steps = (length + per_step - 1) // per_step
    dq = jnp.zeros((rows, tiling.head_dim), jnp.float32)
    return lax.fori_loop(0, num_steps, step, dq) * tiling.scale

  tiles = jnp.arange(q_side[0].shape[0])
  dq = _map_tiles(tile_gradient, (*q_side, lists, list_lengths, tiles))
  return tiling.from_q_tiles(dq)


def _backward_kv(tiling, q_side, kv_side, indices, counts, q_offset, kv_len):
  """dk, dv: every key block walks the transposed list of query tiles."""
  q_tiles, do_tiles, lse_tiles, delta_tiles = q_side
  k_blocks, v_blocks = kv_side
  indices, counts = transpose_lists(indices, counts, tiling.num_kv_blocks)
  lists = tiling.lists_by_unit(indices)
  list_lengths = tiling.lists_by_unit(counts)

  def block_gradient(operands):
    block_list, length, tile = operands
    b, unit, kv_block, first_kv = tiling.split_tile(tile, tiling.num_kv_blocks)
    k_tile, v_tile = (
      k_blocks[first_kv + kv_block],
      v_blocks[first_kv + kv_block],
    )
    kv_positions = kv_block * tiling.block_kv + jnp.arange(tiling.block_kv)
    first_q = (b * tiling.units + unit) * tiling.num_q_blocks
    row = jnp.tile(jnp.arange(tiling.block_q), tiling.group)

    def step(index, carry):
      dk, dv = carry
      q_block = block_list[index]
      tile = first_q + q_block
      q_positions = q_offset[b] + q_block * tiling.block_q + row
      visible = tiling.is_visible(q_positions, kv_positions, kv_len[b])
      p, d_logits = _logit_gradient(
        tiling,
        q_tiles[tile],
        k_tile,
        v_tile,
        do_tiles[tile],
        lse_tiles[tile],
        delta_tiles[tile],
        visible,
      )
      dk += _dot(d_logits.T.astype(q_tiles.dtype), q_tiles[tile], 0)
      dv += _dot(p.T.astype(do_tiles.dtype), do_tiles[tile], 0)
      return dk, dv

    zeros = jnp.zeros((tiling.block_kv, tiling.head_dim), jnp.float32)
    dk, dv = lax.fori_loop(0, length, step, (zeros, zeros))
    return dk * tiling.scale, dv

  tiles = jnp.arange(tiling.batch * tiling.units * tiling.num_kv_blocks)
  gradients = _map_tiles(block_gradient, (lists, list_lengths, tiles))
  per_kv_head = tiling.units // tiling.num_kv_heads
  # Units of one key head are neighbours: add them up.
  return tuple(
    tiling.from_kv_blocks(
      g.reshape(
        tiling.batch * tiling.num_kv_heads,
        per_kv_head,
        tiling.num_kv_blocks,
        tiling.block_kv,
        tiling.head_dim,
      ).sum(1)
    )
    for g in gradients
  )


def transpose_lists(indices, counts, num_kv_blocks):
  """Lists of key blocks by query block to lists of query blocks by key block.

  Args:
    indices: int32 [batch, num_mask_heads, num_q_blocks, max_blocks].
    counts: int32 [batch, num_mask_heads, num_q_blocks].
    num_kv_blocks: number of key blocks.

  Returns:
    int32 [batch, num_mask_heads, num_kv_blocks, num_q_blocks], ascending, and
    int32 [batch, num_mask_heads, num_kv_blocks].
  """
  batch, num_mask_heads, num_q_blocks, _ = indices.shape
  slot = lax.broadcasted_iota(jnp.int32, indices.shape, 3)
  is_listed = slot < counts[..., None]
  kept = jnp.zeros(
    (batch, num_mask_heads, num_kv_blocks, num_q_blocks), jnp.bool_
  )
  kept = kept.at[
    lax.broadcasted_iota(jnp.int32, indices.shape, 0),
    lax.broadcasted_iota(jnp.int32, indices.shape, 1),
    jnp.where(is_listed, indices, num_kv_blocks),
    lax.broadcasted_iota(jnp.int32, indices.shape, 2),
  ].set(True, mode="drop")
  q_block = lax.broadcasted_iota(jnp.int32, kept.shape, 3)
  order = jnp.sort(jnp.where(kept, q_block, num_q_blocks), axis=-1)
  order = jnp.minimum(order, num_q_blocks - 1)
  return order, kept.sum(-1, dtype=jnp.int32)


def _map_tiles(fn, operands):
  """`lax.map` over tiles, abreast where the device is wide."""
  if jax.default_backend() == "cpu":
    return lax.map(fn, operands)
  return lax.map(fn, operands, batch_size=_TILES_ABREAST)


def _read_list(tiling, block_list, length, index):
  """Blocks of dq's step and their keys' positions; past the end: invisible."""
  start = index * tiling.backward_step
  blocks = lax.dynamic_slice(block_list, (start,), (tiling.backward_step,))
  key = jnp.arange(tiling.backward_step * tiling.block_kv)
  positions = jnp.repeat(blocks * tiling.block_kv, tiling.block_kv)
  positions += key % tiling.block_kv
  is_listed = start + key // tiling.block_kv < length
  return blocks, jnp.where(is_listed, positions, jnp.iinfo(jnp.int32).max)


def _dot(a, b, b_axis):
  """Contracts the last axis of a with `b_axis` of b; float32 result."""
  return lax.dot_general(
    a,
    b,
    (((a.ndim - 1,), (b_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
