# SPDX-License-Identifier: Apache-2.0
"""TPU kernel: each block of queries walks its list of key blocks.

One grid step attends one block of queries of all the heads that share a mask
head and a key head. Its list travels to scalar memory with it (a block of a few
KiB; all lists together would not fit the 1 MiB there). The listed blocks of K
and V are copied from HBM two deep, across grid steps too: the last block of a
row is attended while the first of the next is on its way.

Everything is transposed: logits are [keys, queries], so that the maxima and
sums of the softmax run along sublanes, which adds whole registers, and the
row statistics are lane vectors, the shape in which lse is stored.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tpu_backend
from pallas_kernels.block_sparse_attention import masked_lists, xla_gradient
from pallas_kernels.tpu_backend import pltpu

_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # finite: a row of masked logits must not make NaN
_MAX_ROWS = 1024  # queries of a step, over the heads that share its list


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
  compile_only=False,
  interpret=False,
):
  """See `api.block_sparse_attention` and, for the last two, `tpu_backend`."""
  tpu_backend.check(compile_only, interpret)
  for name, value in (("block_q", block_q), ("block_kv", block_kv)):
    if value % 16:
      raise NotImplementedError(
        f"mosaic_tpu needs {name} to be a multiple of 16; got {name}={value}. "
        'Use implementation="xla".'
      )
  return xla_gradient.attend(
    functools.partial(_forward, interpret=interpret),
    q,
    k,
    v,
    kv_block_indices,
    num_kv_blocks,
    q_offset,
    kv_len,
    (block_q, block_kv, causal, scale),
  )


def _kernel(
  # prefetched to scalar memory
  counts_ref,  # int32 [batch * num_mask_heads * num_q_blocks]
  num_masked_ref,  # int32 [batch * num_mask_heads * num_q_blocks]
  heads_ref,  # int32 [batch * num_mask_heads * num_q_blocks], first entries
  q_offset_ref,  # int32 [batch]
  kv_len_ref,  # int32 [batch]
  # inputs
  list_ref,  # int32 [1, max_blocks], scalar memory
  q_ref,  # [head_dim, rows]
  k_ref,  # [batch * num_kv_heads * num_kv_blocks, block_kv, head_dim], HBM
  v_ref,  # [batch * num_kv_heads * num_kv_blocks, head_dim, block_kv], HBM
  # outputs
  out_ref,  # [head_dim, rows]
  lse_ref,  # float32 [1, rows]
  # scratch
  acc_ref,  # float32 [head_dim, rows]
  max_ref,  # float32 [1, rows]
  sum_ref,  # float32 [1, rows]
  k_buffer,  # [2, block_kv, head_dim]
  v_buffer,  # [2, head_dim, block_kv]
  semaphores,  # DMA [2, k or v]
  turn_ref,  # int32 [1], scalar memory: the buffer of the row's first block
  *,
  block_q,
  block_kv,
  causal,
  logit_scale,
  units_per_mask_head,
  units_per_kv_head,
  num_kv_blocks,
  precision,
):
  b, unit, q_block = (pl.program_id(axis) for axis in range(3))
  num_units, num_q_blocks = pl.num_programs(1), pl.num_programs(2)
  here = (b * num_units + unit) * num_q_blocks + q_block

  def rows_of(step):
    """A grid step's row of the lists, and its first block of K and V."""
    unit, q_block = step // num_q_blocks, lax.rem(step, num_q_blocks)
    mask_row = unit // units_per_mask_head * num_q_blocks + q_block
    return mask_row, unit // units_per_kv_head * num_kv_blocks

  mask_row, first_kv = rows_of(here)
  count, num_masked = counts_ref[mask_row], num_masked_ref[mask_row]
  first_q = q_offset_ref[b] + q_block * block_q
  valid = kv_len_ref[b]

  def copies(block, buffer):
    return (
      pltpu.make_async_copy(
        k_ref.at[block], k_buffer.at[buffer], semaphores.at[buffer, 0]
      ),
      pltpu.make_async_copy(
        v_ref.at[block], v_buffer.at[buffer], semaphores.at[buffer, 1]
      ),
    )

  def start(block, buffer):
    for copy in copies(block, buffer):
      copy.start()

  def start_next_row(buffer):
    """Starts the first copy of the next grid step, which then need not wait."""

    @pl.when(here + 1 < pl.num_programs(0) * num_units * num_q_blocks)
    def _():
      mask_row, first_kv = rows_of(here + 1)

      @pl.when(counts_ref[mask_row] > 0)
      def _():
        start(first_kv + heads_ref[mask_row], buffer)

  @pl.when(here == 0)
  def _():
    turn_ref[0] = 0

    @pl.when(count > 0)
    def _():
      start(first_kv + list_ref[0, 0], 0)

  turn = turn_ref[0]
  acc_ref[...] = jnp.zeros_like(acc_ref)
  max_ref[...] = jnp.full_like(max_ref, _LOWEST)
  sum_ref[...] = jnp.zeros_like(sum_ref)
  q = q_ref[...]

  def dot(a, b):
    return lax.dot(
      a, b, precision=precision, preferred_element_type=jnp.float32
    )

  def update(logits, values):  # [block_kv, rows], [head_dim, block_kv]
    old_max = max_ref[...]
    new_max = jnp.maximum(old_max, logits.max(0, keepdims=True))
    p = jnp.exp2(logits - new_max)
    shrink = jnp.exp2(old_max - new_max)
    max_ref[...] = new_max
    sum_ref[...] = sum_ref[...] * shrink + p.sum(0, keepdims=True)
    acc_ref[...] = acc_ref[...] * shrink + dot(values, p.astype(values.dtype))

  def step(slot, _):
    buffer = lax.rem(turn + slot, 2)

    @pl.when(slot + 1 < count)
    def _():
      start(first_kv + list_ref[0, slot + 1], 1 - buffer)

    @pl.when(slot + 1 == count)
    def _():
      start_next_row(1 - buffer)

    for copy in copies(first_kv + list_ref[0, slot], buffer):
      copy.wait()
    logits = dot(k_buffer[buffer], q) * logit_scale

    @pl.when(slot < num_masked)
    def _():
      first_key = list_ref[0, slot] * block_kv
      key = first_key + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
      visible = key < valid
      if causal:
        row = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        visible &= key <= first_q + lax.rem(row, jnp.int32(block_q))
      # Invalid values may be anything: 0 times infinity is not 0.
      values = v_buffer[buffer]
      column = first_key + lax.broadcasted_iota(jnp.int32, values.shape, 1)
      values = jnp.where(column < valid, values, jnp.zeros_like(values))
      update(jnp.where(visible, logits, -jnp.inf), values)

    @pl.when(slot >= num_masked)
    def _():
      update(logits, v_buffer[buffer])

    return _

  lax.fori_loop(0, count, step, None)

  @pl.when(count == 0)
  def _():
    start_next_row(turn)

  turn_ref[0] = lax.rem(turn + count, 2)
  total = sum_ref[...]
  is_empty = total == 0.0
  safe = jnp.where(is_empty, 1.0, total)
  out_ref[...] = (acc_ref[...] / safe).astype(out_ref.dtype)
  lse = (max_ref[...] + jnp.log2(safe)) / _LOG2_E
  lse_ref[...] = jnp.where(is_empty, -jnp.inf, lse)


def _forward(
  q,
  k,
  v,
  indices,
  counts,
  q_offset,
  kv_len,
  *,
  block_q,
  block_kv,
  causal,
  scale,
  interpret,
):
  batch, q_len, num_heads, head_dim = q.shape
  kv_capacity, num_kv_heads = k.shape[1:3]
  indices, num_masked = masked_lists.prepare(
    indices,
    counts,
    q_offset,
    kv_len,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
  )
  num_mask_heads, num_q_blocks, max_blocks = indices.shape[1:]
  dtype = q.dtype
  if dtype == jnp.float16:  # not a TPU's type
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  group = math.gcd(num_heads // num_kv_heads, num_heads // num_mask_heads)
  while group * block_q > _MAX_ROWS and group > 1:
    group = next(g for g in range(group - 1, 0, -1) if group % g == 0)
  units, rows = num_heads // group, group * block_q
  num_kv_blocks = pl.cdiv(kv_capacity, block_kv)

  def pad(x, length):
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))

  # [batch, units, num_q_blocks, head_dim, group * block_q]
  q = pad(q, num_q_blocks * block_q)
  q = q.reshape(batch, num_q_blocks, block_q, units, group, head_dim)
  q = jnp.transpose(q, (0, 3, 1, 5, 4, 2))
  q = q.reshape(batch, units, num_q_blocks, head_dim, rows)
  k, v = (
    pad(x, num_kv_blocks * block_kv).reshape(
      batch, num_kv_blocks, block_kv, num_kv_heads, head_dim
    )
    for x in (k, v)
  )
  k = jnp.transpose(k, (0, 3, 1, 2, 4)).reshape(-1, block_kv, head_dim)
  v = jnp.transpose(v, (0, 3, 1, 4, 2)).reshape(-1, head_dim, block_kv)
  per_mask_head = units // num_mask_heads
  all_pairs = batch * num_heads * num_q_blocks * block_q * max_blocks * block_kv

  def row_block(*tail):
    return pl.BlockSpec(
      (None, None, None, *tail), lambda b, unit, i, *_: (b, unit, i, 0, 0)
    )

  out, lse = tpu_backend.call(
    functools.partial(
      _kernel,
      block_q=block_q,
      block_kv=block_kv,
      causal=causal,
      logit_scale=scale * _LOG2_E,
      units_per_mask_head=per_mask_head,
      units_per_kv_head=units // num_kv_heads,
      num_kv_blocks=num_kv_blocks,
      precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    ),
    num_scalar_prefetch=5,
    grid=(batch, units, num_q_blocks),
    in_specs=[
      pl.BlockSpec(
        (None, None, None, 1, max_blocks),
        lambda b, unit, i, *_: (b, unit // per_mask_head, i, 0, 0),
        memory_space=pltpu.SMEM,
      ),
      row_block(head_dim, rows),
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=[row_block(head_dim, rows), row_block(1, rows)],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((batch, units, num_q_blocks, 1, rows), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((head_dim, rows), jnp.float32),
      pltpu.VMEM((1, rows), jnp.float32),
      pltpu.VMEM((1, rows), jnp.float32),
      pltpu.VMEM((2, block_kv, head_dim), k.dtype),
      pltpu.VMEM((2, head_dim, block_kv), k.dtype),
      pltpu.SemaphoreType.DMA((2, 2)),
      pltpu.SMEM((1,), jnp.int32),
    ],
    # Of full lists; how many blocks are kept is known at run time only.
    cost=pl.CostEstimate(
      flops=4 * all_pairs * head_dim,
      transcendentals=all_pairs,
      bytes_accessed=2 * q.size * q.dtype.itemsize
      + 2 * all_pairs // rows * head_dim * k.dtype.itemsize,
    ),
    interpret=interpret,
    name="block_sparse_attention",
  )(
    counts.reshape(-1),
    num_masked.reshape(-1),
    indices[..., 0].reshape(-1),
    q_offset,
    kv_len,
    indices[:, :, :, None, :],
    q,
    k,
    v,
  )
  out = out.reshape(batch, units, num_q_blocks, head_dim, group, block_q)
  out = jnp.transpose(out, (0, 2, 5, 1, 4, 3))
  out = out.reshape(batch, -1, num_heads, head_dim)
  lse = lse.reshape(batch, units, num_q_blocks, group, block_q)
  lse = jnp.transpose(lse, (0, 2, 4, 1, 3)).reshape(batch, -1, num_heads)
  return out[:, :q_len].astype(dtype), lse[:, :q_len]
