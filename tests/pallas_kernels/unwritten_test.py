"""Every element of a result is written: results begin as NaN.

Pallas' interpreters begin so by themselves, which the suites of interpreted
kernels lean on. A card does not: here its memory is filled with NaN and freed,
so that a kernel's results and temporaries come to lie in it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu_backend, tpu_backend, triton_backend
from pallas_kernels.block_sparse_attention import columns, mosaic_gpu
from pallas_kernels.column_score_sampling import mosaic_gpu as sampling
from tests import helpers

Q_LEN, KV_LEN, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 300, 333, 4, 2, 128, 128
_ARRAYS_OF_EACH_SIZE = 32


def write_nothing(*refs):
  del refs


def whole(*shape):
  return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def test_interpreters_begin_with_nan():
  shape = (8, 128)
  out_shape = jax.ShapeDtypeStruct(shape, jnp.float32)
  by_triton = triton_backend.call(
    write_nothing,
    grid=(1,),
    out_shape=out_shape,
    num_warps=4,
    num_stages=1,
    interpret=True,
    name="nothing",
  )
  by_tpu = tpu_backend.call(
    write_nothing,
    num_scalar_prefetch=1,
    grid=(1,),
    in_specs=[],
    out_specs=whole(*shape),
    out_shape=out_shape,
    interpret=True,
    name="nothing",
  )
  for result in (by_triton(), by_tpu(jnp.zeros((1,), jnp.int32))):
    assert np.isnan(result).all()


def call_in_poisoned_memory(fn, *args):
  """fn(*args), whose results and temporaries begin with all bits set: NaN."""
  compiled = jax.jit(fn).lower(*args).compile()
  memory = compiled.memory_analysis()
  assert memory is not None
  sizes = {
    x.size * x.dtype.itemsize for x in jax.tree.leaves(compiled.out_info)
  }
  sizes |= {memory.temp_size_in_bytes} - {0}
  freed, kept = [], []
  for size in sizes:
    ones = np.full(size, 0xFF, np.uint8)
    for _ in range(_ARRAYS_OF_EACH_SIZE):
      freed.append(jax.device_put(ones))
      # Between two of them, so that what is freed keeps its size.
      kept.append(jax.device_put(ones[:1]))
  jax.block_until_ready((freed, kept))
  for array in freed:
    array.delete()
  return jax.block_until_ready(compiled(*args))


def attention_case():
  """q, k, v, and every row's blocks; some rows have none."""
  q, k, v = helpers.make_qkv(
    q_len=Q_LEN,
    kv_len=KV_LEN,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    dtype=jnp.bfloat16,
  )
  indices, counts = helpers.random_lists(
    np.random.default_rng(0),
    batch=1,
    num_mask_heads=KV_HEADS,
    num_q_blocks=-(-Q_LEN // BLOCK),
    num_kv_blocks=-(-KV_LEN // BLOCK),
  )
  scalars = jnp.array([KV_LEN - Q_LEN]), jnp.array([KV_LEN])
  attend = functools.partial(
    mosaic_gpu.attention,
    block_q=BLOCK,
    block_kv=BLOCK,
    causal=True,
    scale=HEAD_DIM**-0.5,
  )
  return attend, (q, k, v), (indices, counts, *scalars)


def forward():
  attend, arrays, lists = attention_case()
  return attend, (*arrays, *lists)


def backward():
  attend, arrays, lists = attention_case()

  def gradients(*arrays):
    (out, lse), pull = jax.vjp(lambda *x: attend(*x, *lists), *arrays)
    return pull((jnp.cos(out), jnp.where(jnp.isinf(lse), 0.0, 1.0)))

  return gradients, arrays


def of_columns():
  _, (q, k, v), _ = attention_case()
  positions = jnp.broadcast_to(
    jnp.arange(KV_LEN, dtype=jnp.int32),
    (1, KV_HEADS, -(-Q_LEN // BLOCK), KV_LEN),
  )

  def attend(q, k, v):
    return columns.attend_on_hopper(
      q, k, v, positions, jnp.zeros((1,), jnp.int32), (BLOCK, True, 0.1)
    )

  return attend, (q, k, v)


def sampled_columns():
  _, (q, k, _), _ = attention_case()
  last = jnp.arange(Q_LEN, dtype=jnp.int32)[None]

  def sample(q, k):
    return sampling.sample(
      q, k, last, scale=HEAD_DIM**-0.5, schedule=sampling.Schedule()
    )

  return sample, (q, k)


@pytest.mark.gpu
def test_memory_of_the_card_is_poisoned():
  _, plgpu = mosaic_gpu_backend.pallas()
  nothing = plgpu.kernel(
    write_nothing,
    out_type=jax.ShapeDtypeStruct((Q_LEN, HEADS, HEAD_DIM), jnp.float32),
  )
  assert np.isnan(call_in_poisoned_memory(nothing)).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
  "make_case", [forward, backward, of_columns, sampled_columns]
)
def test_every_element_is_written_on_the_card(make_case):
  fn, args = make_case()
  for result in jax.tree.leaves(call_in_poisoned_memory(fn, *args)):
    assert not np.isnan(np.asarray(result, np.float32)).any()
