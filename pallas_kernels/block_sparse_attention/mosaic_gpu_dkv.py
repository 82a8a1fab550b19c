# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of dk and dv: a block of keys walks the query blocks that
list it, for every query head of its key head in turn.

A thread block a block of keys: tiles are few and long, so that the next free
multiprocessor should take the next tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic_gpu_backend as backend
from pallas_kernels.block_sparse_attention import (
  mosaic_gpu_common as common,
)

_FAR = 1 << 30


def call(
  arrays, q_blocks, starts, lengths, num_masked, q_offset, kv_len, tiling
):
  _, k, _, _, _ = arrays
  _, plgpu = backend.pallas()
  config, head_dim = tiling.config, tiling.head_dim
  compute_wgs = tiling.block_kv // backend.ROWS
  num_tiles = tiling.batch * tiling.num_kv_heads * tiling.num_kv_blocks
  transforms = backend.transforms(plgpu)
  kv_smem = plgpu.SMEM(
    (compute_wgs, backend.ROWS, head_dim), k.dtype, transforms=transforms
  )
  q_smem = plgpu.SMEM(
    (config.stages_dkv, backend.ROWS, head_dim), k.dtype, transforms=transforms
  )
  stage_free = plgpu.Barrier(
    num_arrivals=compute_wgs, num_barriers=config.stages_dkv
  )
  kernel = plgpu.kernel(
    functools.partial(_dkv_kernel, tiling=tiling),
    out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
    scratch_types=dict(
      k_smem=kv_smem,
      v_smem=kv_smem,
      q_smem=q_smem,
      do_smem=q_smem,
      stat_smem=plgpu.SMEM((config.stages_dkv, 2, backend.ROWS), jnp.float32),
      kv_full=plgpu.Barrier(num_arrivals=2 * compute_wgs),
      q_full=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages_dkv),
      do_full=plgpu.Barrier(num_barriers=config.stages_dkv),
      q_free=stage_free,
      do_free=stage_free,
    ),
    grid=(num_tiles,),
    grid_names=("tile",),
    num_threads=compute_wgs + 1,
    thread_name="wg",
    compiler_params=backend.compiler_params(plgpu),
  )
  # Work of a key block: over all query heads of its key head.
  by_head = jnp.repeat(lengths, tiling.heads_per_mask, axis=1)
  by_head = by_head.reshape(
    tiling.batch * tiling.num_kv_heads, tiling.group, tiling.num_kv_blocks
  )
  return kernel(
    *arrays,
    common.longest_first(by_head.sum(1)),
    q_blocks.reshape(-1),
    starts.reshape(-1),
    lengths.reshape(-1),
    num_masked.reshape(-1),
    q_offset,
    kv_len,
  )


def _dkv_kernel(
  q_ref,  # [batch, q_len, num_heads, head_dim]
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  v_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  do_ref,  # [batch, q_len, num_heads, head_dim]
  stat_ref,  # float32 [batch, num_heads, q_len / 64, 2, 64]
  order_ref,  # int32 [batch * num_kv_heads * num_kv_blocks]
  q_blocks_ref,  # int32 [batch * num_mask_heads * num_q_blocks * max_blocks]
  starts_ref,  # int32 [batch * num_mask_heads * num_kv_blocks]
  lengths_ref,  # int32 [batch * num_mask_heads * num_kv_blocks]
  num_masked_ref,  # int32 [batch * num_mask_heads * num_kv_blocks]
  q_offset_ref,  # int32 [batch]
  kv_len_ref,  # int32 [batch]
  dk_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  dv_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  *,
  k_smem,  # [compute_wgs, 64, head_dim]; keys, then dk
  v_smem,  # [compute_wgs, 64, head_dim]; values, then dv
  q_smem,  # [stages, 64, head_dim]
  do_smem,  # [stages, 64, head_dim]
  stat_smem,  # float32 [stages, 2, 64]
  kv_full,
  q_full,
  do_full,
  q_free,
  do_free,
  tiling: common.BackwardTiling,
):
  pl, plgpu = backend.pallas()
  stages = tiling.config.stages_dkv
  per_block = tiling.block_q // backend.ROWS
  compute_wgs = tiling.block_kv // backend.ROWS
  list_room = tiling.num_q_blocks * tiling.max_blocks
  wg = lax.axis_index("wg")
  tile = order_ref[lax.axis_index("tile")]
  batch_head = lax.div(tile, tiling.num_kv_blocks)
  batch = lax.div(batch_head, tiling.num_kv_heads)
  kv_head = lax.rem(batch_head, tiling.num_kv_heads)
  kv_block = lax.rem(tile, tiling.num_kv_blocks)

  def list_of(head):
    """Number of the list, and where its query blocks start."""
    mask_row = batch * tiling.num_mask_heads + lax.div(
      head, tiling.heads_per_mask
    )
    number = mask_row * tiling.num_kv_blocks + kv_block
    return number, mask_row * list_room + starts_ref[number]

  @pl.when(wg == compute_wgs)
  def _load():
    plgpu.set_max_registers(backend.LOADER_REGISTERS, action="decrease")

    for index in range(compute_wgs):
      start = kv_block * tiling.block_kv + index * backend.ROWS
      keys = (batch, pl.ds(start, backend.ROWS), kv_head)
      plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[index], kv_full)
      plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[index], kv_full)

    def load_head(member, done):
      head = kv_head * tiling.group + member
      number, first = list_of(head)
      num_steps = lengths_ref[number] * per_block

      def load_step(step, _):
        slot = lax.rem(done + step, stages)
        q_block = q_blocks_ref[first + lax.div(step, per_block)]
        tile = q_block * per_block + lax.rem(step, per_block)
        rows = (batch, pl.ds(tile * backend.ROWS, backend.ROWS), head)
        is_reused = done + step >= stages

        @pl.when(is_reused)
        def _():
          plgpu.barrier_wait(q_free.at[slot])

        plgpu.copy_gmem_to_smem(
          q_ref.at[rows], q_smem.at[slot], q_full.at[slot]
        )
        plgpu.copy_gmem_to_smem(
          stat_ref.at[batch, head, tile], stat_smem.at[slot], q_full.at[slot]
        )

        @pl.when(is_reused)
        def _():
          plgpu.barrier_wait(do_free.at[slot])

        plgpu.copy_gmem_to_smem(
          do_ref.at[rows], do_smem.at[slot], do_full.at[slot]
        )

      lax.fori_loop(0, num_steps, load_step, None)
      return done + num_steps

    lax.fori_loop(0, tiling.group, load_head, jnp.int32(0))

  @pl.when(wg < compute_wgs)
  def _compute():
    plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")
    shape = (backend.ROWS, backend.ROWS)  # keys, queries
    per_query = plgpu.Layout.WGMMA.reduce(0)
    per_key = plgpu.Layout.WGMMA.reduce(1)

    first_key = kv_block * tiling.block_kv + wg * backend.ROWS
    key = first_key + plgpu.broadcasted_iota(
      jnp.int32, (backend.ROWS,), 0, layout=per_key
    )
    # Least position, counted from query 0, that sees each key.
    least = jnp.full((backend.ROWS,), -_FAR, jnp.int32)
    if tiling.causal:
      least = key - q_offset_ref[batch]
    is_valid = key < jnp.full((backend.ROWS,), kv_len_ref[batch], jnp.int32)
    least = jnp.where(
      is_valid, least, jnp.full((backend.ROWS,), _FAR, jnp.int32)
    )
    plgpu.barrier_wait(kv_full)

    def head_fn(member, carry):
      done, dk, dv = carry
      head = kv_head * tiling.group + member
      number, first = list_of(head)
      num_steps = lengths_ref[number] * per_block
      num_masked = num_masked_ref[number] * per_block

      def step_fn(step, carry, is_masked):
        dk, dv = carry
        slot = lax.rem(done + step, stages)

        def ask_logits(acc_ref):
          plgpu.barrier_wait(q_full.at[slot])
          plgpu.wgmma(acc_ref, k_smem.at[wg], q_smem.at[slot].transpose((1, 0)))

        def ask_dp(acc_ref):
          plgpu.barrier_wait(do_full.at[slot])
          plgpu.wgmma(
            acc_ref, v_smem.at[wg], do_smem.at[slot].transpose((1, 0))
          )

        def read(name):
          index = ("lse", "delta").index(name)
          row = backend.load(stat_smem.at[slot, index], layout=per_query)
          return lax.broadcast_in_dim(row, shape, [1])

        def mask(logits):
          if not is_masked:
            return logits
          q_block = q_blocks_ref[first + lax.div(step, per_block)]
          tile = q_block * per_block + lax.rem(step, per_block)
          query = plgpu.broadcasted_iota(
            jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
          )
          limit = lax.broadcast_in_dim(least - tile * backend.ROWS, shape, [0])
          return jnp.where(query >= limit, logits, -jnp.inf)

        p, d_logits = pl.run_scoped(
          common.tile_gradients(
            ask_logits, ask_dp, read, mask, tiling.scale_log2
          ),
          plgpu.ACC(shape, jnp.float32),
          plgpu.ACC(shape, jnp.float32),
        )
        p, d_logits = p.astype(q_ref.dtype), d_logits.astype(q_ref.dtype)

        def accumulate(refs):
          dk_acc, dv_acc = refs
          plgpu.wgmma(dv_acc, p, do_smem.at[slot])
          plgpu.wgmma(dk_acc, d_logits, q_smem.at[slot])

        dk, dv = pl.run_state(accumulate)(
          (plgpu.ACC.init(dk), plgpu.ACC.init(dv))
        )
        plgpu.barrier_arrive(q_free.at[slot])
        plgpu.barrier_arrive(do_free.at[slot])
        return dk, dv

      dk, dv = lax.fori_loop(
        0, num_masked, functools.partial(step_fn, is_masked=True), (dk, dv)
      )
      dk, dv = lax.fori_loop(
        num_masked,
        num_steps,
        functools.partial(step_fn, is_masked=False),
        (dk, dv),
      )
      return done + num_steps, dk, dv

    zeros = plgpu.layout_cast(
      jnp.full((backend.ROWS, tiling.head_dim), 0, jnp.float32),
      plgpu.Layout.WGMMA,
    )
    _, dk, dv = lax.fori_loop(
      0, tiling.group, head_fn, (jnp.int32(0), zeros, zeros)
    )
    k_smem.at[wg][...] = (dk * tiling.scale).astype(q_ref.dtype)
    v_smem.at[wg][...] = dv.astype(q_ref.dtype)
    plgpu.commit_smem()
    keys = (batch, pl.ds(first_key, backend.ROWS), kv_head)
    plgpu.copy_smem_to_gmem(k_smem.at[wg], dk_ref.at[keys])
    plgpu.copy_smem_to_gmem(v_smem.at[wg], dv_ref.at[keys])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
