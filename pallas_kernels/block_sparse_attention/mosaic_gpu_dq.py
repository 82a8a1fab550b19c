# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of dq: 128 query rows walk their block list again."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import device
from pallas_kernels import mosaic_gpu_backend as backend
from pallas_kernels.block_sparse_attention import (
  mosaic_gpu_common as common,
)


def call(arrays, indices, counts, num_masked, q_offset, kv_len, tiling):
  q, _, _, _, _ = arrays
  _, plgpu = backend.pallas()
  config, head_dim = tiling.config, tiling.head_dim
  compute_wgs = tiling.block_q // backend.ROWS
  num_tiles = tiling.batch * tiling.num_heads * tiling.num_q_blocks
  num_ctas = min(num_tiles, device.num_multiprocessors())
  transforms = backend.transforms(plgpu)
  q_smem = plgpu.SMEM(
    (compute_wgs, backend.ROWS, head_dim), q.dtype, transforms=transforms
  )
  kv_smem = plgpu.SMEM(
    (config.stages_dq, config.tile_kv, head_dim),
    q.dtype,
    transforms=transforms,
  )
  stage_free = plgpu.Barrier(
    num_arrivals=compute_wgs, num_barriers=config.stages_dq
  )
  kernel = plgpu.kernel(
    functools.partial(
      _dq_kernel, tiling=tiling, num_tiles=num_tiles, num_ctas=num_ctas
    ),
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_types=dict(
      q_smem=q_smem,
      do_smem=q_smem,
      k_smem=kv_smem,
      v_smem=kv_smem,
      stat_smem=plgpu.SMEM((compute_wgs, 2, backend.ROWS), jnp.float32),
      q_full=plgpu.Barrier(num_arrivals=3 * compute_wgs),
      q_free=plgpu.Barrier(num_arrivals=compute_wgs),
      k_full=plgpu.Barrier(num_barriers=config.stages_dq),
      v_full=plgpu.Barrier(num_barriers=config.stages_dq),
      k_free=stage_free,
      v_free=stage_free,
    ),
    grid=(num_ctas,),
    grid_names=("cta",),
    num_threads=compute_wgs + 1,
    thread_name="wg",
    compiler_params=backend.compiler_params(plgpu),
  )
  return kernel(
    *arrays,
    common.longest_first(
      counts.reshape(-1, tiling.num_q_blocks), tiling.heads_per_mask, num_ctas
    ),
    indices.reshape(-1),
    counts.reshape(-1),
    num_masked.reshape(-1),
    q_offset,
    kv_len,
  )


def _dq_kernel(
  q_ref,  # [batch, q_len, num_heads, head_dim]
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  v_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  do_ref,  # [batch, q_len, num_heads, head_dim]
  stat_ref,  # float32 [batch, num_heads, q_len / 64, 2, 64]
  order_ref,  # int32 [rows]
  indices_ref,  # int32 [rows * max_blocks]
  counts_ref,  # int32 [rows]
  num_masked_ref,  # int32 [rows]
  q_offset_ref,  # int32 [batch]
  kv_len_ref,  # int32 [batch]
  dq_ref,  # [batch, q_len, num_heads, head_dim]
  *,
  q_smem,  # [compute_wgs, 64, head_dim]; queries, then dq
  do_smem,  # [compute_wgs, 64, head_dim]
  k_smem,  # [stages, tile_kv, head_dim]
  v_smem,  # [stages, tile_kv, head_dim]
  stat_smem,  # float32 [compute_wgs, 2, 64]
  q_full,
  q_free,
  k_full,
  v_full,
  k_free,
  v_free,
  tiling: common.BackwardTiling,
  num_tiles: int,
  num_ctas: int,
):
  pl, plgpu = backend.pallas()
  config = tiling.config
  tile_kv, stages = config.tile_kv, config.stages_dq
  per_block = tiling.block_kv // tile_kv
  compute_wgs = tiling.block_q // backend.ROWS
  wg = lax.axis_index("wg")
  my_turns, tile_number = common.rounds(
    num_tiles, num_ctas, lax.axis_index("cta")
  )

  def tile_at(turn):
    tile = tile_number(turn)
    row = order_ref[lax.div(tile, tiling.heads_per_mask)]
    mask_row = lax.div(row, tiling.num_q_blocks)
    batch = lax.div(mask_row, tiling.num_mask_heads)
    head = lax.rem(mask_row, tiling.num_mask_heads) * tiling.heads_per_mask
    head += lax.rem(tile, tiling.heads_per_mask)
    return row, batch, lax.rem(row, tiling.num_q_blocks), head

  @pl.when(wg == compute_wgs)
  def _load():
    plgpu.set_max_registers(backend.LOADER_REGISTERS, action="decrease")

    def load_tile(turn, done):
      row, batch, q_block, head = tile_at(turn)
      kv_head = lax.div(head, tiling.group)
      num_steps = counts_ref[row] * per_block

      @pl.when(turn > 0)
      def _():
        plgpu.barrier_wait(q_free)

      for index in range(compute_wgs):
        start = q_block * tiling.block_q + index * backend.ROWS
        rows = (batch, pl.ds(start, backend.ROWS), head)
        plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem.at[index], q_full)
        plgpu.copy_gmem_to_smem(do_ref.at[rows], do_smem.at[index], q_full)
        plgpu.copy_gmem_to_smem(
          stat_ref.at[batch, head, q_block * compute_wgs + index],
          stat_smem.at[index],
          q_full,
        )

      def load_step(step, _):
        slot = lax.rem(done + step, stages)
        block = indices_ref[row * tiling.max_blocks + lax.div(step, per_block)]
        start = block * tiling.block_kv + lax.rem(step, per_block) * tile_kv
        keys = (batch, pl.ds(start, tile_kv), kv_head)
        is_reused = done + step >= stages

        @pl.when(is_reused)
        def _():
          plgpu.barrier_wait(k_free.at[slot])

        plgpu.copy_gmem_to_smem(
          k_ref.at[keys], k_smem.at[slot], k_full.at[slot]
        )

        @pl.when(is_reused)
        def _():
          plgpu.barrier_wait(v_free.at[slot])

        plgpu.copy_gmem_to_smem(
          v_ref.at[keys], v_smem.at[slot], v_full.at[slot]
        )

      lax.fori_loop(0, num_steps, load_step, None)
      return done + num_steps

    lax.fori_loop(0, my_turns, load_tile, jnp.int32(0))

  @pl.when(wg < compute_wgs)
  def _compute():
    plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")

    def compute_tile(turn, done):
      row, batch, q_block, head = tile_at(turn)
      num_steps = counts_ref[row] * per_block
      num_masked = num_masked_ref[row] * per_block
      plgpu.barrier_wait(q_full)
      per_row = plgpu.Layout.WGMMA.reduce(1)
      statistics = {
        name: backend.load(stat_smem.at[wg, index], layout=per_row)
        for index, name in enumerate(("lse", "delta"))
      }
      first_query = q_block * tiling.block_q + wg * backend.ROWS
      num_visible = jnp.full((backend.ROWS,), kv_len_ref[batch], jnp.int32)
      if tiling.causal:
        position = plgpu.broadcasted_iota(
          jnp.int32, (backend.ROWS,), 0, layout=per_row
        )
        num_visible = jnp.minimum(
          num_visible, position + (q_offset_ref[batch] + first_query + 1)
        )

      def step_fn(step, dq, is_masked):
        slot = lax.rem(done + step, stages)
        shape = (backend.ROWS, tile_kv)

        def ask_logits(acc_ref):
          plgpu.barrier_wait(k_full.at[slot])
          plgpu.wgmma(acc_ref, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))

        def ask_dp(acc_ref):
          plgpu.barrier_wait(v_full.at[slot])
          plgpu.wgmma(
            acc_ref, do_smem.at[wg], v_smem.at[slot].transpose((1, 0))
          )

        def read(name):
          return lax.broadcast_in_dim(statistics[name], shape, [0])

        def mask(logits):
          if not is_masked:
            return logits
          block = indices_ref[
            row * tiling.max_blocks + lax.div(step, per_block)
          ]
          start = block * tiling.block_kv + lax.rem(step, per_block) * tile_kv
          key = plgpu.broadcasted_iota(
            jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
          )
          limit = lax.broadcast_in_dim(num_visible - start, shape, [0])
          return jnp.where(key < limit, logits, -jnp.inf)

        _, d_logits = pl.run_scoped(
          common.tile_gradients(
            ask_logits, ask_dp, read, mask, tiling.scale_log2
          ),
          plgpu.ACC(shape, jnp.float32),
          plgpu.ACC(shape, jnp.float32),
        )
        plgpu.barrier_arrive(v_free.at[slot])
        d_logits = d_logits.astype(q_ref.dtype)

        def multiply_keys(acc_ref):
          plgpu.wgmma(acc_ref, d_logits, k_smem.at[slot])

        dq = pl.run_state(multiply_keys)(plgpu.ACC.init(dq))
        plgpu.barrier_arrive(k_free.at[slot])
        return dq

      dq = plgpu.layout_cast(
        jnp.full((backend.ROWS, tiling.head_dim), 0, jnp.float32),
        plgpu.Layout.WGMMA,
      )
      dq = lax.fori_loop(
        0, num_masked, functools.partial(step_fn, is_masked=True), dq
      )
      dq = lax.fori_loop(
        num_masked, num_steps, functools.partial(step_fn, is_masked=False), dq
      )
      q_smem.at[wg][...] = (dq * tiling.scale).astype(q_ref.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        q_smem.at[wg], dq_ref.at[batch, pl.ds(first_query, backend.ROWS), head]
      )
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(q_free)
      return done + num_steps

    lax.fori_loop(0, my_turns, compute_tile, jnp.int32(0))
