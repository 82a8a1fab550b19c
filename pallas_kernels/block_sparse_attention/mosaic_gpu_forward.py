# SPDX-License-Identifier: Apache-2.0
"""The Hopper forward kernel.

One thread block holds 128 query rows: two compute warpgroups of 64 rows each
and one warpgroup that loads. The loader walks the row's block list and asks the
copy engine for one key and one value tile a step; the compute warpgroups take
turns on the tensor cores, so that one's softmax runs beside the other's
products. Blocks that need a per-token mask come first in a list and are walked
with a mask, the rest without. The softmax scale is folded into the base-2
exponent. Thread blocks are persistent and walk a list of tiles, longest first
within a mask head or several, in turns that reverse so that each gets the same
work; the loader runs ahead into the next tile. Two thread blocks whose heads
share a list may share each load.

TUNING.md beside this file has what was tried and what it brought.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import device
from pallas_kernels import mosaic_gpu_backend as backend
from pallas_kernels.block_sparse_attention import (
  mosaic_gpu_common as common,
)
from pallas_kernels.block_sparse_attention import tuning

_LN_2 = math.log(2.0)
_NO_KEY = -1e30  # running maximum of a row without keys; masked logits are -inf


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Static sizes of one call."""

  num_heads: int
  num_kv_heads: int
  num_mask_heads: int
  num_q_blocks: int
  max_blocks: int
  head_dim: int
  block_q: int
  block_kv: int
  num_rows: int  # batch * num_mask_heads * num_q_blocks
  causal: bool
  scale_log2: float
  config: tuning.ForwardConfig
  has_columns: bool = False

  @property
  def heads_per_mask(self) -> int:
    return self.num_heads // self.num_mask_heads

  @property
  def heads_per_tile(self) -> int:
    """Two heads where a block has one warpgroup's rows and lists are shared."""
    shared = math.gcd(self.heads_per_mask, self.num_heads // self.num_kv_heads)
    return 2 if self.block_q == backend.ROWS and shared % 2 == 0 else 1

  @property
  def compute_wgs(self) -> int:
    return self.heads_per_tile * self.block_q // backend.ROWS

  @property
  def tiles_per_row(self) -> int:
    return self.heads_per_mask // self.heads_per_tile

  @property
  def cluster(self) -> int:
    return (
      self.config.cluster
      if (
        self.tiles_per_row % self.config.cluster == 0
        and self.num_heads
        // self.num_kv_heads
        % (self.config.cluster * self.heads_per_tile)
        == 0
      )
      else 1
    )

  @property
  def num_tiles(self) -> int:
    return self.num_rows * self.tiles_per_row

  @property
  def steps_per_block(self) -> int:
    return self.block_kv // self.config.tile_kv


def call(
  q,
  k,
  v,
  indices,
  counts,
  num_masked,
  q_offset,
  kv_len,
  positions,
  tiling,
):
  """Runs the kernel; lists flattened. lse comes as [batch, heads, rows]."""
  _, plgpu = backend.pallas()
  config, head_dim = tiling.config, tiling.head_dim
  compute_wgs, tile_kv = tiling.compute_wgs, config.tile_kv
  batch = q.shape[0]
  cluster = tiling.cluster
  num_clusters = min(tiling.num_tiles, device.num_multiprocessors()) // cluster
  stage_free = (
    plgpu.Barrier(num_arrivals=compute_wgs, num_barriers=config.stages)
    if cluster == 1
    else plgpu.ClusterBarrier(
      collective_axes=("member",),
      num_arrivals=compute_wgs,
      num_barriers=config.stages,
    )
  )
  transforms = backend.transforms(plgpu)
  kv_smem = plgpu.SMEM(
    (config.stages, tile_kv, head_dim), q.dtype, transforms=transforms
  )
  scratch = dict(
    qo_smem=plgpu.SMEM(
      (config.q_slots, compute_wgs, backend.ROWS, head_dim),
      q.dtype,
      transforms=transforms,
    ),
    k_smem=kv_smem,
    v_smem=kv_smem,
    lse_smem=plgpu.SMEM((compute_wgs, backend.ROWS), jnp.float32),
    q_full=plgpu.Barrier(num_arrivals=compute_wgs, num_barriers=config.q_slots),
    q_free=plgpu.Barrier(num_arrivals=compute_wgs, num_barriers=config.q_slots),
    k_full=plgpu.Barrier(
      num_arrivals=1 + tiling.has_columns, num_barriers=config.stages
    ),
    v_full=plgpu.Barrier(num_barriers=config.stages),
    k_free=stage_free,
    v_free=stage_free,
    turn=plgpu.Barrier(num_arrivals=compute_wgs),
  )
  if tiling.has_columns:
    scratch["position_smem"] = plgpu.SMEM((config.stages, tile_kv), jnp.int32)
  kernel = plgpu.kernel(
    functools.partial(_kernel, tiling=tiling, num_clusters=num_clusters),
    out_type=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(
        (batch, tiling.num_heads, tiling.num_q_blocks * tiling.block_q),
        jnp.float32,
      ),
    ],
    scratch_types=scratch,
    grid=(num_clusters,),
    grid_names=("cluster",),
    cluster=(cluster,),
    cluster_names=("member",),
    num_threads=compute_wgs + 1,
    thread_name="wg",
    compiler_params=backend.compiler_params(plgpu),
  )
  return kernel(
    q,
    k,
    v,
    common.longest_first(
      counts.reshape(-1, tiling.num_q_blocks),
      tiling.tiles_per_row // cluster,
      num_clusters,
    ),
    indices,
    counts,
    num_masked,
    q_offset,
    kv_len,
    positions,
  )


def _kernel(
  q_ref,  # [batch, q_len, num_heads, head_dim]
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  v_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  order_ref,  # int32 [rows]
  indices_ref,  # int32 [rows * max_blocks]
  counts_ref,  # int32 [rows]
  num_masked_ref,  # int32 [rows]
  q_offset_ref,  # int32 [batch]
  kv_len_ref,  # int32 [batch]
  position_ref,  # int32 [rows, kv_len]: of columns, as each query block sees
  out_ref,  # [batch, q_len, num_heads, head_dim]
  lse_ref,  # float32 [batch, num_heads, num_q_blocks * block_q]
  *,
  qo_smem,  # [q_slots, compute_wgs, 64, head_dim]; queries, then the output
  k_smem,  # [stages, tile_kv, head_dim]
  v_smem,  # [stages, tile_kv, head_dim]
  lse_smem,  # float32 [compute_wgs, 64]
  q_full,
  q_free,
  k_full,
  v_full,
  k_free,
  v_free,
  turn,
  tiling: Tiling,
  num_clusters: int,
  position_smem: Any = None,  # int32 [stages, tile_kv]; of columns alone
):
  pl, plgpu = backend.pallas()
  config = tiling.config
  wg = lax.axis_index("wg")
  compute_wgs, stages, q_slots = (
    tiling.compute_wgs,
    config.stages,
    config.q_slots,
  )
  tile_kv, per_block = config.tile_kv, tiling.steps_per_block
  shared_by = "member" if tiling.cluster > 1 else None
  takes_turns = compute_wgs == 2
  my_turns, tile_number = common.rounds(
    tiling.num_tiles // tiling.cluster,
    num_clusters,
    lax.axis_index("cluster"),
  )

  def tile_at(turn_index):
    """Row, batch, query block, first head and key head of a turn's tile."""
    tile = tile_number(turn_index) * tiling.cluster
    if tiling.cluster > 1:
      tile += lax.axis_index("member")
    row = order_ref[lax.div(tile, tiling.tiles_per_row)]
    mask_row = lax.div(row, tiling.num_q_blocks)
    batch = lax.div(mask_row, tiling.num_mask_heads)
    head = lax.rem(mask_row, tiling.num_mask_heads) * tiling.heads_per_mask
    head += lax.rem(tile, tiling.tiles_per_row) * tiling.heads_per_tile
    kv_head = lax.div(head, tiling.num_heads // tiling.num_kv_heads)
    return row, batch, lax.rem(row, tiling.num_q_blocks), head, kv_head

  def slice_of(index, batch, q_block, head):
    """Batch, rows and head of one warpgroup."""
    start = q_block * tiling.block_q
    if tiling.heads_per_tile == 1:
      return batch, pl.ds(start + index * backend.ROWS, backend.ROWS), head
    return batch, pl.ds(start, backend.ROWS), head + index

  @pl.when(wg == compute_wgs)
  def _load():
    plgpu.set_max_registers(backend.LOADER_REGISTERS, action="decrease")

    def load_tile(turn_index, done):
      row, batch, q_block, head, kv_head = tile_at(turn_index)
      num_steps = counts_ref[row] * per_block
      first_index = row * tiling.max_blocks

      def load_step(step, _):
        slot = lax.rem(done + step, stages)
        block = indices_ref[first_index + lax.div(step, per_block)]
        start = block * tiling.block_kv + lax.rem(step, per_block) * tile_kv
        keys = (batch, pl.ds(start, tile_kv), kv_head)
        is_reused = done + step >= stages

        @pl.when(is_reused)
        def _():
          plgpu.barrier_wait(k_free.at[slot])

        plgpu.copy_gmem_to_smem(
          k_ref.at[keys],
          k_smem.at[slot],
          k_full.at[slot],
          collective_axes=shared_by,
        )
        if tiling.has_columns:
          plgpu.copy_gmem_to_smem(
            position_ref.at[row, pl.ds(start, tile_kv)],
            position_smem.at[slot],
            k_full.at[slot],
          )

        @pl.when(is_reused)
        def _():
          plgpu.barrier_wait(v_free.at[slot])

        plgpu.copy_gmem_to_smem(
          v_ref.at[keys],
          v_smem.at[slot],
          v_full.at[slot],
          collective_axes=shared_by,
        )

      # Keys of the next tile need not wait until the last output is stored.
      ahead = jnp.minimum(num_steps, stages)
      lax.fori_loop(0, ahead, load_step, None)
      q_slot = lax.rem(turn_index, q_slots)

      @pl.when(turn_index >= q_slots)
      def _():
        plgpu.barrier_wait(q_free.at[q_slot])

      for index in range(compute_wgs):
        plgpu.copy_gmem_to_smem(
          q_ref.at[slice_of(index, batch, q_block, head)],
          qo_smem.at[q_slot, index],
          q_full.at[q_slot],
        )
      lax.fori_loop(ahead, num_steps, load_step, None)
      return done + num_steps

    done = lax.fori_loop(0, my_turns, load_tile, jnp.int32(0))
    if tiling.cluster > 1:
      # Stay until the other members have arrived here for the last time.
      def drain(step, _):
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])

      lax.fori_loop(jnp.maximum(done - stages, 0), done, drain, None)

  @pl.when(wg < compute_wgs)
  def _compute():
    plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")

    def take_turn():
      if takes_turns:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def compute_tile(turn_index, done):
      row, batch, q_block, head, _ = tile_at(turn_index)
      num_steps = counts_ref[row] * per_block
      num_masked = num_masked_ref[row] * per_block
      first_index = row * tiling.max_blocks
      q_slot = lax.rem(turn_index, q_slots)
      q_smem = qo_smem.at[q_slot, wg]
      # Number of keys, from 0 on, that each row may see.
      num_visible = jnp.full((backend.ROWS,), kv_len_ref[batch], jnp.int32)
      if tiling.causal:
        first = q_offset_ref[batch] + q_block * tiling.block_q + 1
        if tiling.heads_per_tile == 1:
          first += wg * backend.ROWS
        position = plgpu.broadcasted_iota(
          jnp.int32, (backend.ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
        )
        num_visible = jnp.minimum(num_visible, position + first)

      def column_positions(slot):
        if not tiling.has_columns:
          return None
        return backend.load(
          position_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(0)
        )

      def mask_logits(logits, step, positions):
        shape, limit = logits.shape, num_visible
        if tiling.has_columns:
          key = lax.broadcast_in_dim(positions, shape, [1])
        else:
          block = indices_ref[first_index + lax.div(step, per_block)]
          start = block * tiling.block_kv + lax.rem(step, per_block) * tile_kv
          key = plgpu.broadcasted_iota(
            jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
          )
          limit = num_visible - start
        is_visible = key < lax.broadcast_in_dim(limit, shape, [0])
        return jnp.where(is_visible, logits, -jnp.inf)

      def softmax(logits, row_max, row_sum):
        new_max = jnp.maximum(row_max, logits.max(axis=1) * tiling.scale_log2)
        shrink = jnp.exp2(row_max - new_max)
        p = jnp.exp2(
          logits * tiling.scale_log2
          - lax.broadcast_in_dim(new_max, logits.shape, [0])
        )
        return p, shrink, new_max, row_sum * shrink

      zeros = functools.partial(jnp.full, fill_value=0, dtype=jnp.float32)
      acc = plgpu.layout_cast(
        zeros((backend.ROWS, tiling.head_dim)), plgpu.Layout.WGMMA
      )
      row_max = plgpu.layout_cast(
        jnp.full((backend.ROWS,), _NO_KEY, jnp.float32),
        plgpu.Layout.WGMMA.reduce(1),
      )
      row_sum = plgpu.layout_cast(
        zeros((backend.ROWS,)), plgpu.Layout.WGMMA.reduce(1)
      )
      plgpu.barrier_wait(q_full.at[q_slot])
      if takes_turns:
        # Half a step apart in each tile: the second warpgroup must not wait
        # for the first one's next tile, which may wait for this one's keys.
        pl.when(wg == 1)(take_turn)

      def attend_step(step, carry, is_masked):
        acc, row_max, row_sum = carry
        slot = lax.rem(done + step, stages)
        plgpu.barrier_wait(k_full.at[slot])

        def multiply_keys(acc_ref):
          plgpu.wgmma(acc_ref, q_smem, k_smem.at[slot].transpose((1, 0)))
          take_turn()
          return acc_ref[...]

        logits = pl.run_scoped(
          multiply_keys, plgpu.ACC((backend.ROWS, tile_kv), jnp.float32)
        )
        positions = column_positions(slot)
        plgpu.barrier_arrive(k_free.at[slot])
        if is_masked:
          logits = mask_logits(logits, step, positions)
        p, shrink, row_max, row_sum = softmax(logits, row_max, row_sum)
        acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
        p_low = p.astype(q_ref.dtype)
        row_sum += p.sum(axis=1)
        acc, row_sum, row_max, p_low = lax.optimization_barrier(
          (acc, row_sum, row_max, p_low)
        )
        if takes_turns:
          plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_full.at[slot])
        if takes_turns:
          plgpu.barrier_wait(turn)

        def multiply_values(acc_ref):
          plgpu.wgmma(acc_ref, p_low, v_smem.at[slot])

        acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, row_max, row_sum

      carry = lax.fori_loop(
        0,
        num_masked,
        functools.partial(attend_step, is_masked=True),
        (acc, row_max, row_sum),
      )
      acc, row_max, row_sum = lax.fori_loop(
        num_masked,
        num_steps,
        functools.partial(attend_step, is_masked=False),
        carry,
      )

      if takes_turns:

        @pl.when(wg == 0)
        def _():
          plgpu.barrier_arrive(turn)

      is_empty = row_sum == 0.0
      inverse = jnp.where(is_empty, 0.0, 1.0 / row_sum)
      acc *= lax.broadcast_in_dim(inverse, acc.shape, [0])
      lse = jnp.where(is_empty, -jnp.inf, row_max * _LN_2 + jnp.log(row_sum))
      q_smem[...] = acc.astype(q_ref.dtype)
      lse_smem.at[wg][...] = lse
      plgpu.commit_smem()
      batch_index, rows, my_head = slice_of(wg, batch, q_block, head)
      plgpu.copy_smem_to_gmem(q_smem, out_ref.at[batch_index, rows, my_head])
      plgpu.copy_smem_to_gmem(
        lse_smem.at[wg], lse_ref.at[batch_index, my_head, rows]
      )
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(q_free.at[q_slot])
      if takes_turns:

        @pl.when(wg == 0)
        def _():
          plgpu.barrier_wait(turn)

      return done + num_steps

    lax.fori_loop(0, my_turns, compute_tile, jnp.int32(0))
