"""Hopper back end, gradients: dq over the block lists, dk and dv over theirs
transposed.

With p = exp(logits - lse) and delta = <out, d_out> - d_lse,

  d_logits = p * (d_out v^T - delta)
  dq = scale * d_logits k,  dk = scale * d_logits^T q,  dv = p^T d_out.

Two kernels, each as warp-specialised as the forward one. The first holds 128
query rows and walks their list. The second holds one block of keys and walks
the query blocks that list it, for every query head of the key head in turn, so
that sums over a group stay in registers, nothing is added atomically, and two
runs give the same bits. Both recompute the logits, hence 7 products a pair of
blocks where 5 are counted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import device
from pallas_kernels.block_sparse_attention import mosaic_gpu_common as common
from pallas_kernels.block_sparse_attention import tuning

_EMPTY = 1e30  # log-sum-exp of rows without keys: their p is exactly 0
_FAR = 1 << 30
HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True)
class _Tiling:
  """Static sizes of one call."""

  num_heads: int
  num_kv_heads: int
  num_mask_heads: int
  num_q_blocks: int
  num_kv_blocks: int
  max_blocks: int
  head_dim: int
  batch: int
  block_q: int
  block_kv: int
  causal: bool
  scale: float
  config: tuning.BackwardConfig

  @property
  def group(self) -> int:
    return self.num_heads // self.num_kv_heads

  @property
  def heads_per_mask(self) -> int:
    return self.num_heads // self.num_mask_heads

  @property
  def scale_log2(self) -> float:
    return self.scale * common.LOG2_E


def backward(residuals, cotangents, settings, config=None):
  """dq, dk, dv of `mosaic_gpu.block_sparse_attention`.

  Args:
    residuals: (q, k, v, indices, counts, q_offset, kv_len, out, lse).
    cotangents: of (out, lse).
    settings: (block_q, block_kv, causal, scale).
    config: schedule; default the tuned.

  Returns:
    dq, dk, dv with the shapes and dtypes of q, k, v.
  """
  q, k, v, indices, counts, q_offset, kv_len, out, lse = residuals
  d_out, d_lse = cotangents
  block_q, block_kv, causal, scale = settings
  if config is None:
    config = tuning.backward_config(q.shape[-1], block_q, block_kv)
  batch, q_len, num_heads, head_dim = q.shape
  kv_capacity = k.shape[1]
  num_mask_heads, num_q_blocks, max_blocks = indices.shape[1:]
  tiling = _Tiling(
    num_heads=num_heads,
    num_kv_heads=k.shape[2],
    num_mask_heads=num_mask_heads,
    num_q_blocks=num_q_blocks,
    num_kv_blocks=-(-kv_capacity // block_kv),
    max_blocks=max_blocks,
    head_dim=head_dim,
    batch=batch,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    scale=scale,
    config=config,
  )
  delta = (
    jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - d_lse
  )
  is_empty = jnp.isneginf(lse)
  lse_log2 = jnp.where(is_empty, _EMPTY, lse * common.LOG2_E)
  delta = jnp.where(is_empty, 0.0, delta)
  statistics = _tile_statistics(lse_log2, delta, num_q_blocks * block_q)
  q, d_out = (common.pad_length(x, common.ROWS) for x in (q, d_out))
  k, v = (common.pad_length(x, block_kv) for x in (k, v))
  num_masked = common.count_masked(
    indices, counts, q_offset, kv_len, block_q, block_kv, causal
  )
  arrays = (q, k, v, d_out, statistics)
  dq = _call_dq(arrays, indices, counts, num_masked, q_offset, kv_len, tiling)
  transposed = transpose_lists(
    indices,
    counts,
    q_offset,
    kv_len,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    num_kv_blocks=tiling.num_kv_blocks,
  )
  dk, dv = _call_dkv(arrays, *transposed, q_offset, kv_len, tiling)
  return dq[:, :q_len], dk[:, :kv_capacity], dv[:, :kv_capacity]


def _tile_statistics(lse_log2, delta, padded):
  """float32 [batch, heads, padded / 64, 2, 64]: lse (base 2) and delta."""
  missing = padded - lse_log2.shape[1]

  def tile(x, fill):
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(*x.shape[:2], -1, common.ROWS)

  return jnp.stack([tile(lse_log2, _EMPTY), tile(delta, 0.0)], axis=3)


def transpose_lists(
  indices, counts, q_offset, kv_len, *, block_q, block_kv, causal, num_kv_blocks
):
  """For each key block the query blocks that list it, one after the other.

  Args:
    indices: int32 [batch, num_mask_heads, num_q_blocks, max_blocks].
    counts: int32 [batch, num_mask_heads, num_q_blocks].
    q_offset: int32 [batch].
    kv_len: int32 [batch].
    block_q: queries per block.
    block_kv: keys per block.
    causal: whether a query sees only keys up to its own position.
    num_kv_blocks: number of key blocks.

  Returns:
    int32 [batch, num_mask_heads, num_q_blocks * max_blocks]: query blocks,
    ascending within a key block; int32 [batch, num_mask_heads, num_kv_blocks]
    three times: where a key block's part starts, its length, and how many of
    its first query blocks may need a per-token mask. Memory is that of the
    lists, not of all pairs of blocks.
  """
  batch, num_mask_heads, num_q_blocks, _ = indices.shape
  slot, q_block = (
    lax.broadcasted_iota(jnp.int32, indices.shape, axis) for axis in (3, 2)
  )
  is_listed = slot < counts[..., None]
  pair = jnp.where(
    is_listed,
    indices * num_q_blocks + q_block,
    num_kv_blocks * num_q_blocks,
  )
  pair = jnp.sort(pair.reshape(batch, num_mask_heads, -1), axis=-1)
  # Query blocks ascend: the masked ones (diagonal) are a prefix, or, in the
  # block where the valid keys end, all.
  needs_mask = is_listed & common.needs_mask(
    indices, q_offset, kv_len, block_q, block_kv, causal
  )
  lead = [
    lax.broadcasted_iota(jnp.int32, indices.shape, axis) for axis in (0, 1)
  ]

  def count(is_counted):
    zeros = jnp.zeros((batch, num_mask_heads, num_kv_blocks), jnp.int32)
    return zeros.at[(*lead, indices)].add(
      is_counted.astype(jnp.int32), mode="drop"
    )

  lengths = count(is_listed)
  starts = jnp.cumsum(lengths, axis=-1) - lengths
  return pair % num_q_blocks, starts, lengths, count(needs_mask)


def _call_dq(arrays, indices, counts, num_masked, q_offset, kv_len, tiling):
  q, _, _, _, _ = arrays
  _, plgpu = common.pallas()
  config, head_dim = tiling.config, tiling.head_dim
  compute_wgs = tiling.block_q // common.ROWS
  num_tiles = tiling.batch * tiling.num_heads * tiling.num_q_blocks
  num_ctas = min(num_tiles, device.num_multiprocessors())
  transforms = common.transforms(plgpu)
  q_smem = plgpu.SMEM(
    (compute_wgs, common.ROWS, head_dim), q.dtype, transforms=transforms
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
      stat_smem=plgpu.SMEM((compute_wgs, 2, common.ROWS), jnp.float32),
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
    compiler_params=common.compiler_params(plgpu),
  )
  return kernel(
    *arrays,
    common.longest_first(counts.reshape(-1, tiling.num_q_blocks)),
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
  tiling: _Tiling,
  num_tiles: int,
  num_ctas: int,
):
  pl, plgpu = common.pallas()
  config = tiling.config
  tile_kv, stages = config.tile_kv, config.stages_dq
  per_block = tiling.block_kv // tile_kv
  compute_wgs = tiling.block_q // common.ROWS
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
    plgpu.set_max_registers(common.LOADER_REGISTERS, action="decrease")

    def load_tile(turn, done):
      row, batch, q_block, head = tile_at(turn)
      kv_head = lax.div(head, tiling.group)
      num_steps = counts_ref[row] * per_block

      @pl.when(turn > 0)
      def _():
        plgpu.barrier_wait(q_free)

      for index in range(compute_wgs):
        start = q_block * tiling.block_q + index * common.ROWS
        rows = (batch, pl.ds(start, common.ROWS), head)
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
      lse = plgpu.load(stat_smem.at[wg, 0], layout=per_row)
      delta = plgpu.load(stat_smem.at[wg, 1], layout=per_row)
      first_query = q_block * tiling.block_q + wg * common.ROWS
      num_visible = jnp.full((common.ROWS,), kv_len_ref[batch], jnp.int32)
      if tiling.causal:
        position = plgpu.broadcasted_iota(
          jnp.int32, (common.ROWS,), 0, layout=per_row
        )
        num_visible = jnp.minimum(
          num_visible, position + (q_offset_ref[batch] + first_query + 1)
        )

      def step_fn(step, dq, is_masked):
        slot = lax.rem(done + step, stages)
        shape = (common.ROWS, tile_kv)

        def multiply(logits_ref, dp_ref):
          plgpu.barrier_wait(k_full.at[slot])
          plgpu.wgmma(
            logits_ref, q_smem.at[wg], k_smem.at[slot].transpose((1, 0))
          )
          plgpu.barrier_wait(v_full.at[slot])
          plgpu.wgmma(dp_ref, do_smem.at[wg], v_smem.at[slot].transpose((1, 0)))
          logits = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
          logits = lax.optimization_barrier(logits)
          if is_masked:
            block = indices_ref[
              row * tiling.max_blocks + lax.div(step, per_block)
            ]
            start = block * tiling.block_kv + lax.rem(step, per_block) * tile_kv
            key = plgpu.broadcasted_iota(
              jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
            )
            limit = lax.broadcast_in_dim(num_visible - start, shape, [0])
            logits = jnp.where(key < limit, logits, -jnp.inf)
          p = jnp.exp2(
            logits * tiling.scale_log2 - lax.broadcast_in_dim(lse, shape, [0])
          )
          p = lax.optimization_barrier(p)
          dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
          dp = lax.optimization_barrier(dp)
          plgpu.barrier_arrive(v_free.at[slot])
          return p * (dp - lax.broadcast_in_dim(delta, shape, [0]))

        d_logits = pl.run_scoped(
          multiply,
          plgpu.ACC(shape, jnp.float32),
          plgpu.ACC(shape, jnp.float32),
        )
        d_logits = d_logits.astype(q_ref.dtype)

        def multiply_keys(acc_ref):
          plgpu.wgmma(acc_ref, d_logits, k_smem.at[slot])

        dq = pl.run_state(multiply_keys)(plgpu.ACC.init(dq))
        plgpu.barrier_arrive(k_free.at[slot])
        return dq

      dq = plgpu.layout_cast(
        jnp.full((common.ROWS, tiling.head_dim), 0, jnp.float32),
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
        q_smem.at[wg], dq_ref.at[batch, pl.ds(first_query, common.ROWS), head]
      )
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(q_free)
      return done + num_steps

    lax.fori_loop(0, my_turns, compute_tile, jnp.int32(0))


def _call_dkv(
  arrays, q_blocks, starts, lengths, num_masked, q_offset, kv_len, tiling
):
  _, k, _, _, _ = arrays
  _, plgpu = common.pallas()
  config, head_dim = tiling.config, tiling.head_dim
  compute_wgs = tiling.block_kv // common.ROWS
  num_tiles = tiling.batch * tiling.num_kv_heads * tiling.num_kv_blocks
  num_ctas = min(num_tiles, device.num_multiprocessors())
  transforms = common.transforms(plgpu)
  kv_smem = plgpu.SMEM(
    (compute_wgs, common.ROWS, head_dim), k.dtype, transforms=transforms
  )
  q_smem = plgpu.SMEM(
    (config.stages_dkv, common.ROWS, head_dim), k.dtype, transforms=transforms
  )
  stage_free = plgpu.Barrier(
    num_arrivals=compute_wgs, num_barriers=config.stages_dkv
  )
  kernel = plgpu.kernel(
    functools.partial(
      _dkv_kernel, tiling=tiling, num_tiles=num_tiles, num_ctas=num_ctas
    ),
    out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
    scratch_types=dict(
      k_smem=kv_smem,
      v_smem=kv_smem,
      q_smem=q_smem,
      do_smem=q_smem,
      stat_smem=plgpu.SMEM((config.stages_dkv, 2, common.ROWS), jnp.float32),
      kv_full=plgpu.Barrier(num_arrivals=2 * compute_wgs),
      kv_free=plgpu.Barrier(num_arrivals=compute_wgs),
      q_full=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages_dkv),
      do_full=plgpu.Barrier(num_barriers=config.stages_dkv),
      q_free=stage_free,
      do_free=stage_free,
    ),
    grid=(num_ctas,),
    grid_names=("cta",),
    num_threads=compute_wgs + 1,
    thread_name="wg",
    compiler_params=common.compiler_params(plgpu),
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
  kv_free,
  q_full,
  do_full,
  q_free,
  do_free,
  tiling: _Tiling,
  num_tiles: int,
  num_ctas: int,
):
  pl, plgpu = common.pallas()
  stages = tiling.config.stages_dkv
  per_block = tiling.block_q // common.ROWS
  compute_wgs = tiling.block_kv // common.ROWS
  list_room = tiling.num_q_blocks * tiling.max_blocks
  wg = lax.axis_index("wg")
  my_turns, tile_number = common.rounds(
    num_tiles, num_ctas, lax.axis_index("cta")
  )

  def tile_at(turn):
    tile = order_ref[tile_number(turn)]
    batch_head = lax.div(tile, tiling.num_kv_blocks)
    return (
      lax.div(batch_head, tiling.num_kv_heads),
      lax.rem(batch_head, tiling.num_kv_heads),
      lax.rem(tile, tiling.num_kv_blocks),
    )

  def list_of(batch, head, kv_block):
    """Number of the list, and where its query blocks start."""
    mask_row = batch * tiling.num_mask_heads + lax.div(
      head, tiling.heads_per_mask
    )
    number = mask_row * tiling.num_kv_blocks + kv_block
    return number, mask_row * list_room + starts_ref[number]

  @pl.when(wg == compute_wgs)
  def _load():
    plgpu.set_max_registers(common.LOADER_REGISTERS, action="decrease")

    def load_tile(turn, done):
      batch, kv_head, kv_block = tile_at(turn)

      @pl.when(turn > 0)
      def _():
        plgpu.barrier_wait(kv_free)

      for index in range(compute_wgs):
        start = kv_block * tiling.block_kv + index * common.ROWS
        keys = (batch, pl.ds(start, common.ROWS), kv_head)
        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[index], kv_full)
        plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[index], kv_full)

      def load_head(member, done):
        head = kv_head * tiling.group + member
        number, first = list_of(batch, head, kv_block)
        num_steps = lengths_ref[number] * per_block

        def load_step(step, _):
          slot = lax.rem(done + step, stages)
          q_block = q_blocks_ref[first + lax.div(step, per_block)]
          tile = q_block * per_block + lax.rem(step, per_block)
          rows = (batch, pl.ds(tile * common.ROWS, common.ROWS), head)
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

      return lax.fori_loop(0, tiling.group, load_head, done)

    lax.fori_loop(0, my_turns, load_tile, jnp.int32(0))

  @pl.when(wg < compute_wgs)
  def _compute():
    plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")
    shape = (common.ROWS, common.ROWS)  # keys, queries
    per_query = plgpu.Layout.WGMMA.reduce(0)
    per_key = plgpu.Layout.WGMMA.reduce(1)

    def compute_tile(turn, done):
      batch, kv_head, kv_block = tile_at(turn)
      first_key = kv_block * tiling.block_kv + wg * common.ROWS
      key = first_key + plgpu.broadcasted_iota(
        jnp.int32, (common.ROWS,), 0, layout=per_key
      )
      # Least position, counted from query 0, that sees each key.
      least = jnp.full((common.ROWS,), -_FAR, jnp.int32)
      if tiling.causal:
        least = key - q_offset_ref[batch]
      is_valid = key < jnp.full((common.ROWS,), kv_len_ref[batch], jnp.int32)
      least = jnp.where(
        is_valid, least, jnp.full((common.ROWS,), _FAR, jnp.int32)
      )
      plgpu.barrier_wait(kv_full)

      def head_fn(member, carry):
        done, dk, dv = carry
        head = kv_head * tiling.group + member
        number, first = list_of(batch, head, kv_block)
        num_steps = lengths_ref[number] * per_block
        num_masked = num_masked_ref[number] * per_block

        def step_fn(step, carry, is_masked):
          dk, dv = carry
          slot = lax.rem(done + step, stages)

          def multiply(logits_ref, dp_ref):
            plgpu.barrier_wait(q_full.at[slot])
            plgpu.wgmma(
              logits_ref, k_smem.at[wg], q_smem.at[slot].transpose((1, 0))
            )
            plgpu.barrier_wait(do_full.at[slot])
            plgpu.wgmma(
              dp_ref, v_smem.at[wg], do_smem.at[slot].transpose((1, 0))
            )
            lse = plgpu.load(stat_smem.at[slot, 0], layout=per_query)
            delta = plgpu.load(stat_smem.at[slot, 1], layout=per_query)
            logits = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
            logits = lax.optimization_barrier(logits)
            if is_masked:
              q_block = q_blocks_ref[first + lax.div(step, per_block)]
              tile = q_block * per_block + lax.rem(step, per_block)
              query = plgpu.broadcasted_iota(
                jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
              )
              limit = lax.broadcast_in_dim(
                least - tile * common.ROWS, shape, [0]
              )
              logits = jnp.where(query >= limit, logits, -jnp.inf)
            p = jnp.exp2(
              logits * tiling.scale_log2 - lax.broadcast_in_dim(lse, shape, [1])
            )
            p = lax.optimization_barrier(p)
            dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
            dp = lax.optimization_barrier(dp)
            return p, p * (dp - lax.broadcast_in_dim(delta, shape, [1]))

          p, d_logits = pl.run_scoped(
            multiply,
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
        jnp.full((common.ROWS, tiling.head_dim), 0, jnp.float32),
        plgpu.Layout.WGMMA,
      )
      done, dk, dv = lax.fori_loop(
        0, tiling.group, head_fn, (done, zeros, zeros)
      )
      k_smem.at[wg][...] = (dk * tiling.scale).astype(q_ref.dtype)
      v_smem.at[wg][...] = dv.astype(q_ref.dtype)
      plgpu.commit_smem()
      keys = (batch, pl.ds(first_key, common.ROWS), kv_head)
      plgpu.copy_smem_to_gmem(k_smem.at[wg], dk_ref.at[keys])
      plgpu.copy_smem_to_gmem(v_smem.at[wg], dv_ref.at[keys])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(kv_free)
      return done

    lax.fori_loop(0, my_turns, compute_tile, jnp.int32(0))
