# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for NVIDIA GPUs: one program selects and lists a few rows."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import triton_backend
from pallas_kernels.block_selection import rules, search
from pallas_kernels.triton_backend import plgpu

_TILE = 2048  # scores of one program
_MAX_BLOCKS = 1 << 14  # a row lives in the registers of one program


def block_selection(
  block_scores,  # float32 [batch, num_mask_heads, num_q_blocks, num_kv_blocks]
  q_len,  # int32 [batch]
  kv_len,  # int32 [batch]
  q_offset,  # int32 [batch]
  mass_budget,  # float32 [num_mask_heads]; infinity: none
  *,
  block_q,
  block_kv,
  causal,
  top_k,
  num_sink_blocks,
  num_local_blocks,
  max_blocks,
  capability=None,
  interpret=False,
):
  """See `api.block_selection` and, for the last two, `triton_backend`."""
  triton_backend.target(capability, interpret)
  batch, num_mask_heads, num_q_blocks, num_kv_blocks = block_scores.shape
  width = pl.next_power_of_2(num_kv_blocks)
  if width > _MAX_BLOCKS:
    raise NotImplementedError(
      f"triton needs num_kv_blocks <= {_MAX_BLOCKS}; got "
      f'num_kv_blocks={num_kv_blocks}. Use implementation="xla".'
    )
  rows = max(1, min(_TILE // width, pl.next_power_of_2(num_q_blocks)))
  scores = triton_backend.pad_axis(block_scores, 2, rows)
  scores = triton_backend.pad_axis(scores, 3, width)
  padded = scores.shape[2]
  indices, counts, num_selected = triton_backend.call(
    functools.partial(
      _kernel,
      rows=rows,
      num_q_blocks=num_q_blocks,
      num_kv_blocks=num_kv_blocks,
      block_q=block_q,
      rule=functools.partial(
        rules.admissible_and_forced,
        block_kv=block_kv,
        causal=causal,
        num_sink_blocks=num_sink_blocks,
        num_local_blocks=num_local_blocks,
      ),
      count_budget=top_k,
      room=max_blocks,
    ),
    grid=(pl.cdiv(num_q_blocks, rows), num_mask_heads, batch),
    out_shape=(
      jax.ShapeDtypeStruct(
        (batch, num_mask_heads, padded, max_blocks), jnp.int32
      ),
      *[jax.ShapeDtypeStruct((batch, num_mask_heads, padded), jnp.int32)] * 2,
    ),
    num_warps=8 if width > _TILE else 4,
    num_stages=1,
    interpret=interpret,
    name="block_selection",
  )(scores, q_len, kv_len, q_offset, mass_budget)
  return (
    indices[:, :, :num_q_blocks],
    counts[:, :, :num_q_blocks],
    num_selected[:, :, :num_q_blocks],
  )


def _kernel(
  scores_ref,  # float32 [batch, num_mask_heads, num_q_blocks, width]
  q_len_ref,  # int32 [batch]
  kv_len_ref,  # int32 [batch]
  q_offset_ref,  # int32 [batch]
  mass_budget_ref,  # float32 [num_mask_heads]
  indices_ref,  # int32 [batch, num_mask_heads, num_q_blocks, room]
  counts_ref,  # int32 [batch, num_mask_heads, num_q_blocks]
  num_selected_ref,  # int32 [batch, num_mask_heads, num_q_blocks]
  *,
  rows,
  num_q_blocks,
  num_kv_blocks,
  block_q,
  rule,
  count_budget,
  room,
):
  start = pl.program_id(0) * rows
  head, b = pl.program_id(1), pl.program_id(2)
  width = scores_ref.shape[3]
  row = start + jnp.arange(rows, dtype=jnp.int32)
  is_row = row < num_q_blocks
  strip = (b, head, pl.ds(start, rows))
  at = (*strip, pl.ds(0, width))
  scores = plgpu.load(scores_ref.at[at], mask=is_row[:, None], other=0.0)

  block = lax.broadcasted_iota(jnp.int32, (rows, width), 1)
  first, last = rules.row_positions(row, block_q, q_len_ref[b], q_offset_ref[b])
  admissible, forced = rule(block, first[:, None], last[:, None], kv_len_ref[b])
  is_block = block < num_kv_blocks
  kept, num_selected = search.keep(
    scores,
    admissible & is_block,
    forced & is_block,
    jnp.broadcast_to(mass_budget_ref[head], (rows,)),
    count_budget,
    room,
  )
  slot, count = search.slots(kept)
  # Every slot is written once: a block's, or a zero past the last one's.
  rest = count[:, None] + lax.cumsum((~kept).astype(jnp.int32), axis=1) - 1
  slot = jnp.where(kept, slot, rest)
  plgpu.store(
    indices_ref.at[
      b,
      head,
      lax.broadcast_in_dim(row, (rows, width), (0,)),
      slot,
    ],
    jnp.where(kept, block, 0),
    mask=lax.broadcast_in_dim(is_row, (rows, width), (0,)) & (slot < room),
  )
  plgpu.store(counts_ref.at[strip], count, mask=is_row)
  plgpu.store(num_selected_ref.at[strip], num_selected, mask=is_row)
