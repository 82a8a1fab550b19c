# SPDX-License-Identifier: Apache-2.0
"""Every element of a result is written: results begin as NaN.

Pallas' interpreters begin so by themselves, which the suites of interpreted
kernels lean on. A card does not: here its memory is filled with NaN and freed,
so that a kernel's results and temporaries come to lie in it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from experiments.kernels import kernel_cases
from pallas_kernels import mosaic_gpu_backend, tpu_backend, triton_backend

_ARRAYS_OF_EACH_SIZE = 32
# Beside those that the sanitizer watches: other widths and dtypes, with the
# number of Mosaic GPU kernels in each.
MORE_CASES = {
  "forward_256": (kernel_cases.attention, (256, False), 1),
  "forward_256_float16": (kernel_cases.attention, (256, False, "float16"), 1),
  "forward_128_float16": (kernel_cases.attention, (128, False, "float16"), 1),
  "backward_256": (kernel_cases.attention, (256, True), 1),  # and XLA's
  "backward_64_float16": (kernel_cases.attention, (64, True, "float16"), 3),
  "columns_256": (kernel_cases.column_attention, (256,), 1),
  "columns_64_float16": (kernel_cases.column_attention, (64, "float16"), 1),
  "sampled_64_float16": (kernel_cases.sampled_scores, (64, "float16"), 2),
}


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


@pytest.mark.parametrize("name", MORE_CASES)
def test_further_cases_lower_for_cuda(name):
  make, settings, kernels = MORE_CASES[name]
  fn, arrays = make(*settings)
  lowered = jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("@mosaic_gpu") == kernels


@pytest.mark.gpu
def test_memory_of_the_card_is_poisoned():
  _, plgpu = mosaic_gpu_backend.pallas()
  nothing = plgpu.kernel(
    write_nothing,
    out_type=jax.ShapeDtypeStruct((300, 4, 128), jnp.float32),
  )
  assert np.isnan(call_in_poisoned_memory(nothing)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*kernel_cases.CASES, *MORE_CASES])
def test_every_element_is_written_on_the_card(name):
  if name in MORE_CASES:
    make, settings, _ = MORE_CASES[name]
    fn, args = make(*settings)
  else:
    fn, args = kernel_cases.CASES[name]()
  for result in jax.tree.leaves(call_in_poisoned_memory(fn, *args)):
    assert not np.isnan(np.asarray(result, np.float32)).any()
