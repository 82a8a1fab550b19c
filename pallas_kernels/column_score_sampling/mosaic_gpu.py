# SPDX-License-Identifier: Apache-2.0
"""Hopper kernels: two passes on the tensor cores' own instructions.

As in the Triton back end, the first pass finds the log-sum-exp of each sampled
row and the second sums probabilities by key, each column by one warpgroup in
one order. In both, warpgroups of 64 rows of one operand stay while tiles of the
other are brought by the copy engine: one's exponentials run beside the others'
products.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import device
from pallas_kernels import mosaic_gpu_backend as backend
from pallas_kernels.column_score_sampling import tiles

_NO_KEY = -1e30  # running maximum of a row without keys; masked logits are -inf
_EMPTY = 1e30  # log-sum-exp of rows without keys: their p is exactly 0
_MIN_WAVES = 2  # tiles of rows a multiprocessor, fewer are left to Triton
HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """Static sizes.

  Attributes:
    compute_wgs: warpgroups that multiply, of 64 rows (first pass) or keys.
    tile: rows or keys of a tile that is brought.
    stages: such tiles in shared memory.
    registers: of a thread of these warpgroups.

  Measured on an H100, head_dim 128, 128K keys, 5% of rows, ms of both passes,
  each twice: 4 warpgroups, 2 stages, 12.4 and 12.4; 3, 3 stages, 14.7 and 14.0;
  4, tiles of 64, 4 stages, 15.8 and 15.5; 2, 3 stages, 16.4 and 16.3. The
  Triton kernels beside them: 19.2 and 19.5.
  """

  compute_wgs: int = 4
  tile: int = 128
  stages: int = 2
  registers: int = 112

  @property
  def rows(self) -> int:
    return self.compute_wgs * backend.ROWS


@dataclasses.dataclass(frozen=True)
class _Sizes:
  num_heads: int
  num_kv_heads: int
  num_tiles: int  # of the operand that stays
  head_dim: int
  scale_log2: float
  schedule: Schedule

  @property
  def group(self) -> int:
    return self.num_heads // self.num_kv_heads


def column_score_sampling(
  q,  # [batch, num_rows, num_heads, head_dim]
  k,  # [batch, kv_len, num_kv_heads, head_dim]
  last_keys,  # int32 [batch, num_rows], the last key that a row sees; -1: none
  *,
  scale,
  schedule: Schedule | None = None,
):
  """See `api.column_score_sampling`."""
  backend.check_hopper()
  for name, value, choices in (
    ("head_dim", q.shape[-1], HEAD_DIMS),
    ("dtype", jnp.dtype(q.dtype).name, ("bfloat16", "float16")),
  ):
    if value not in choices:
      raise NotImplementedError(
        f"mosaic_gpu serves {name} of {choices}; got {name}={value!r}."
      )
  schedule = Schedule() if schedule is None else schedule
  least = _MIN_WAVES * device.num_multiprocessors()
  found = q.shape[0] * q.shape[2] * (-(-q.shape[1] // schedule.rows))
  if found < least:
    raise NotImplementedError(
      f"mosaic_gpu needs {least} tiles of rows of all heads; got {found}. "
      'Use implementation="triton".'
    )
  return sample(q, k, last_keys, scale=scale, schedule=schedule)


def sample(q, k, last_keys, *, scale, schedule, interpret=None):
  """The op without a look at the device, so that it lowers on any machine."""
  if scale <= 0.0:
    raise NotImplementedError(
      f"mosaic_gpu needs scale > 0; got scale={scale}. "
      'Use implementation="triton".'
    )
  num_rows, num_heads, head_dim = q.shape[1:]
  kv_len, num_kv_heads = k.shape[1:3]
  # Rows by whole tiles of both passes, in the small arrays alone: the copy
  # engine fills what is beyond the end of q and k with zeros.
  multiple = max(schedule.rows, schedule.tile)
  padded = -(-num_rows // schedule.rows) * schedule.rows
  padded = -(-padded // schedule.tile) * schedule.tile
  last_keys = jnp.pad(
    last_keys, ((0, 0), (0, padded - num_rows)), constant_values=-1
  )
  q, k = (backend.pad_length(x, multiple) for x in (q, k))
  sizes = functools.partial(
    _Sizes,
    num_heads,
    num_kv_heads,
    head_dim=head_dim,
    scale_log2=scale * backend.LOG2_E,
    schedule=schedule,
  )
  num_row_tiles = -(-padded // schedule.rows)
  by_tile = jnp.pad(
    last_keys,
    ((0, 0), (0, num_row_tiles * schedule.rows - padded)),
    constant_values=-1,
  )
  by_tile = by_tile.reshape(q.shape[0], num_row_tiles, schedule.rows)
  num_full = (by_tile.min(-1) + 1) // schedule.tile
  num_steps = (by_tile.max(-1) + schedule.tile) // schedule.tile
  lse = _call(
    _lse_kernel,
    (q, k, last_keys, num_full, num_steps),
    sizes(num_tiles=num_row_tiles),
    out=(num_heads, num_row_tiles * schedule.rows),
    heads=num_heads,
    aux=1,
    interpret=interpret,
  )
  num_key_tiles = -(-kv_len // schedule.rows)
  first, full = tiles.row_tile_ranges(
    last_keys, num_key_tiles, schedule.tile, schedule.rows
  )
  scores = _call(
    _sum_kernel,
    (k, q, last_keys, lse, first, full),
    sizes(num_tiles=num_key_tiles),
    out=(num_heads, num_key_tiles * schedule.rows),
    heads=num_kv_heads,
    aux=2,
    interpret=interpret,
  )
  return scores[:, :, :kv_len]


def _call(kernel, arrays, sizes, *, out, heads, aux, interpret):
  """Runs a kernel, a thread block for each head, tile and batch entry.

  aux: small vectors that come with a tile: of the operand that stays (first
    pass) or with each that is brought (second).
  """
  _, plgpu = backend.pallas()
  schedule = sizes.schedule
  batch, dtype = arrays[0].shape[0], arrays[0].dtype
  compute_wgs, stages = schedule.compute_wgs, schedule.stages
  transforms = backend.transforms(plgpu)
  is_sum = kernel is _sum_kernel
  scratch = dict(
    stay_smem=plgpu.SMEM(
      (compute_wgs, backend.ROWS, sizes.head_dim), dtype, transforms=transforms
    ),
    move_smem=plgpu.SMEM(
      (stages, schedule.tile, sizes.head_dim), dtype, transforms=transforms
    ),
    out_smem=plgpu.SMEM((compute_wgs, backend.ROWS), jnp.float32),
    stay_full=plgpu.Barrier(
      num_arrivals=compute_wgs * (1 if is_sum else 1 + aux)
    ),
    move_full=plgpu.Barrier(
      num_arrivals=1 + aux if is_sum else 1, num_barriers=stages
    ),
    move_free=plgpu.Barrier(num_arrivals=compute_wgs, num_barriers=stages),
  )
  if is_sum:
    scratch["last_smem"] = plgpu.SMEM((stages, schedule.tile), jnp.int32)
    scratch["lse_smem"] = plgpu.SMEM((stages, schedule.tile), jnp.float32)
  else:
    scratch["last_smem"] = plgpu.SMEM((compute_wgs, backend.ROWS), jnp.int32)
  options = {} if interpret is None else dict(interpret=interpret)
  return plgpu.kernel(
    functools.partial(kernel, sizes=sizes),
    out_type=jax.ShapeDtypeStruct((batch, *out), jnp.float32),
    scratch_types=scratch,
    grid=(batch * heads * sizes.num_tiles,),
    grid_names=("tile",),
    num_threads=compute_wgs + 1,
    thread_name="wg",
    compiler_params=backend.compiler_params(plgpu),
    **options,
  )(*arrays)


def _lse_kernel(
  q_ref,  # [batch, num_rows, num_heads, head_dim]
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  last_ref,  # int32 [batch, padded rows]
  num_full_ref,  # int32 [batch, num_tiles]
  num_steps_ref,  # int32 [batch, num_tiles]
  lse_ref,  # float32 [batch, num_heads, padded rows], base 2
  *,
  stay_smem,  # [compute_wgs, 64, head_dim]: queries
  move_smem,  # [stages, tile, head_dim]: keys
  out_smem,  # float32 [compute_wgs, 64]
  last_smem,  # int32 [compute_wgs, 64]
  stay_full,
  move_full,
  move_free,
  sizes: _Sizes,
):
  pl, plgpu = backend.pallas()
  schedule = sizes.schedule
  compute_wgs, stages = schedule.compute_wgs, schedule.stages
  wg = lax.axis_index("wg")
  # Heads side by side: they read the same keys. Long tiles, the last, first.
  number = lax.axis_index("tile")
  head = lax.rem(number, sizes.num_heads)
  kv_head = lax.div(head, sizes.group)
  number = lax.div(number, sizes.num_heads)
  tile = sizes.num_tiles - 1 - lax.rem(number, sizes.num_tiles)
  batch = lax.div(number, sizes.num_tiles)
  num_steps = num_steps_ref[batch, tile]

  def rows_of(index):
    return pl.ds(tile * schedule.rows + index * backend.ROWS, backend.ROWS)

  @pl.when(wg == compute_wgs)
  def _load():
    plgpu.set_max_registers(backend.LOADER_REGISTERS, action="decrease")
    for index in range(compute_wgs):
      rows = rows_of(index)
      plgpu.copy_gmem_to_smem(
        q_ref.at[batch, rows, head], stay_smem.at[index], stay_full
      )
      plgpu.copy_gmem_to_smem(
        last_ref.at[batch, rows], last_smem.at[index], stay_full
      )

    def load_step(step, _):
      slot = lax.rem(step, stages)

      @pl.when(step >= stages)
      def _():
        plgpu.barrier_wait(move_free.at[slot])

      keys = pl.ds(step * schedule.tile, schedule.tile)
      plgpu.copy_gmem_to_smem(
        k_ref.at[batch, keys, kv_head], move_smem.at[slot], move_full.at[slot]
      )

    lax.fori_loop(0, num_steps, load_step, None)
    _drain(move_free, num_steps, stages)

  @pl.when(wg < compute_wgs)
  def _compute():
    plgpu.set_max_registers(schedule.registers, action="increase")
    shape = (backend.ROWS, schedule.tile)
    per_row = plgpu.Layout.WGMMA.reduce(1)
    plgpu.barrier_wait(stay_full)
    last = backend.load(last_smem.at[wg], layout=per_row)

    def step_fn(step, carry, is_masked):
      row_max, row_sum = carry
      logits = _multiply(
        stay_smem.at[wg], move_smem, move_full, move_free, step, shape
      )
      if is_masked:
        key = plgpu.broadcasted_iota(
          jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
        )
        limit = lax.broadcast_in_dim(last - step * schedule.tile, shape, [0])
        logits = jnp.where(key <= limit, logits, -jnp.inf)
      new_max = jnp.maximum(row_max, logits.max(axis=1) * sizes.scale_log2)
      p = jnp.exp2(
        logits * sizes.scale_log2 - lax.broadcast_in_dim(new_max, shape, [0])
      )
      row_sum *= jnp.exp2(row_max - new_max)
      return new_max, row_sum + p.sum(axis=1)

    def vector(value):
      return plgpu.layout_cast(
        jnp.full((backend.ROWS,), value, jnp.float32), per_row
      )

    num_full = num_full_ref[batch, tile]
    carry = lax.fori_loop(
      0,
      num_full,
      functools.partial(step_fn, is_masked=False),
      (vector(_NO_KEY), vector(0.0)),
    )
    row_max, row_sum = lax.fori_loop(
      num_full, num_steps, functools.partial(step_fn, is_masked=True), carry
    )
    is_empty = row_sum == 0.0
    lse = row_max + jnp.log(row_sum) * backend.LOG2_E
    out_smem.at[wg][...] = jnp.where(is_empty, _EMPTY, lse)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      out_smem.at[wg], lse_ref.at[batch, head, rows_of(wg)]
    )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _sum_kernel(
  k_ref,  # [batch, kv_len, num_kv_heads, head_dim]
  q_ref,  # [batch, num_rows, num_heads, head_dim]
  last_ref,  # int32 [batch, padded rows]
  lse_ref,  # float32 [batch, num_heads, padded rows], base 2
  first_ref,  # int32 [batch, num_tiles]
  full_ref,  # int32 [batch, num_tiles]
  scores_ref,  # float32 [batch, num_heads, padded keys]
  *,
  stay_smem,  # [compute_wgs, 64, head_dim]: keys
  move_smem,  # [stages, tile, head_dim]: queries
  out_smem,  # float32 [compute_wgs, 64]
  last_smem,  # int32 [stages, tile]
  lse_smem,  # float32 [stages, tile]
  stay_full,
  move_full,
  move_free,
  sizes: _Sizes,
):
  pl, plgpu = backend.pallas()
  schedule = sizes.schedule
  compute_wgs, stages = schedule.compute_wgs, schedule.stages
  wg = lax.axis_index("wg")
  # The first keys, which most rows see, first.
  number = lax.axis_index("tile")
  kv_head = lax.rem(number, sizes.num_kv_heads)
  number = lax.div(number, sizes.num_kv_heads)
  tile = lax.rem(number, sizes.num_tiles)
  batch = lax.div(number, sizes.num_tiles)
  first = first_ref[batch, tile]
  num_row_tiles = last_ref.shape[1] // schedule.tile
  num_steps = num_row_tiles - first

  def keys_of(index):
    return pl.ds(tile * schedule.rows + index * backend.ROWS, backend.ROWS)

  @pl.when(wg == compute_wgs)
  def _load():
    plgpu.set_max_registers(backend.LOADER_REGISTERS, action="decrease")
    for index in range(compute_wgs):
      plgpu.copy_gmem_to_smem(
        k_ref.at[batch, keys_of(index), kv_head], stay_smem.at[index], stay_full
      )

    def load_head(member, done):
      head = kv_head * sizes.group + member

      def load_step(step, _):
        slot = lax.rem(done + step, stages)

        @pl.when(done + step >= stages)
        def _():
          plgpu.barrier_wait(move_free.at[slot])

        rows = pl.ds((first + step) * schedule.tile, schedule.tile)
        full = move_full.at[slot]
        plgpu.copy_gmem_to_smem(
          q_ref.at[batch, rows, head], move_smem.at[slot], full
        )
        plgpu.copy_gmem_to_smem(
          last_ref.at[batch, rows], last_smem.at[slot], full
        )
        plgpu.copy_gmem_to_smem(
          lse_ref.at[batch, head, rows], lse_smem.at[slot], full
        )

      lax.fori_loop(0, num_steps, load_step, None)
      return done + num_steps

    done = lax.fori_loop(0, sizes.group, load_head, jnp.int32(0))
    _drain(move_free, done, stages)

  @pl.when(wg < compute_wgs)
  def _compute():
    plgpu.set_max_registers(schedule.registers, action="increase")
    shape = (backend.ROWS, schedule.tile)
    per_key = plgpu.Layout.WGMMA.reduce(1)
    per_row = plgpu.Layout.WGMMA.reduce(0)
    key = plgpu.broadcasted_iota(jnp.int32, (backend.ROWS,), 0, layout=per_key)
    key += tile * schedule.rows + wg * backend.ROWS
    plgpu.barrier_wait(stay_full)
    num_masked = full_ref[batch, tile] - first

    def head_fn(member, done):
      def step_fn(step, total, is_masked):
        slot = lax.rem(done + step, stages)
        read = []

        def read_vectors():
          read.append(backend.load(lse_smem.at[slot], layout=per_row))
          if is_masked:
            read.append(backend.load(last_smem.at[slot], layout=per_row))

        logits = _multiply(
          stay_smem.at[wg],
          move_smem,
          move_full,
          move_free,
          done + step,
          shape,
          before_free=read_vectors,
        )
        if is_masked:
          is_visible = lax.broadcast_in_dim(
            key, shape, [0]
          ) <= lax.broadcast_in_dim(read[1], shape, [1])
          logits = jnp.where(is_visible, logits, -jnp.inf)
        lse = lax.broadcast_in_dim(read[0], shape, [1])
        p = jnp.exp2(logits * sizes.scale_log2 - lse)
        return total + p.sum(axis=1)

      total = plgpu.layout_cast(
        jnp.full((backend.ROWS,), 0.0, jnp.float32), per_key
      )
      total = lax.fori_loop(
        0, num_masked, functools.partial(step_fn, is_masked=True), total
      )
      total = lax.fori_loop(
        num_masked,
        num_steps,
        functools.partial(step_fn, is_masked=False),
        total,
      )
      out_smem.at[wg][...] = total
      plgpu.commit_smem()
      head = kv_head * sizes.group + member
      plgpu.copy_smem_to_gmem(
        out_smem.at[wg], scores_ref.at[batch, head, keys_of(wg)]
      )
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      return done + num_steps

    lax.fori_loop(0, sizes.group, head_fn, jnp.int32(0))


def _drain(free, done, stages):
  """Waits until the last tiles were read, so that no barrier is left armed."""
  _, plgpu = backend.pallas()

  def wait(step, _):
    plgpu.barrier_wait(free.at[lax.rem(step, stages)])

  lax.fori_loop(jnp.maximum(done - stages, 0), done, wait, None)


def _multiply(stay, move_smem, full, free, step, shape, before_free=None):
  """float32 products of what stays with the tile of a step."""
  pl, plgpu = backend.pallas()
  slot = lax.rem(step, move_smem.shape[0])
  plgpu.barrier_wait(full.at[slot])

  def multiply(acc_ref):
    plgpu.wgmma(acc_ref, stay, move_smem.at[slot].transpose((1, 0)))
    return acc_ref[...]

  logits = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
  if before_free is not None:
    before_free()
    plgpu.commit_smem()  # these reads come before the copy engine's next write
  plgpu.barrier_arrive(free.at[slot])
  return logits
