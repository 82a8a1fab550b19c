# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel lowers for CUDA, every TPU kernel compiles for TPUs.

On a machine with neither. A change of JAX's API breaks a test here, not a user.
"""

import functools
import platform
import sys

import jax
import jax.numpy as jnp
import pytest
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from pallas_kernels import ahead_of_time
from pallas_kernels.block_selection import triton as selection_triton
from pallas_kernels.block_sparse_attention import (
  mosaic_tpu as attention_tpu,
)
from pallas_kernels.block_sparse_attention import triton as attention_triton
from pallas_kernels.cache_append import triton as append_triton
from pallas_kernels.column_score_sampling import mosaic_tpu as columns_tpu
from pallas_kernels.column_score_sampling import triton as columns_triton
from pallas_kernels.composite_pooling import mosaic_tpu as pooling_tpu
from pallas_kernels.composite_scores import mosaic_tpu as scores_tpu
from pallas_kernels.composite_scores import reference as scores_reference
from pallas_kernels.composite_scores import triton as scores_triton
from pallas_kernels.head_rotation import triton as rotation_triton
from pallas_kernels.logistic_likelihood import triton as likelihood_triton
from pallas_kernels.top_log_probs import triton as top_triton
from pallas_kernels.tree_attention import triton as tree_triton

LENGTH = 4096
# JAX says of its Triton back end that it will go.
pytestmark = pytest.mark.filterwarnings(
  "ignore:The Pallas Triton backend:DeprecationWarning"
)

needs_libtpu = pytest.mark.skipif(
  not ahead_of_time.has_libtpu(),
  reason="libtpu is not installed: pip install unisparse-jax[tpu]",
)


def array(*shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(shape, dtype)


def attention(module, dtype, head_dim, block=128):
  blocks = LENGTH // block
  q = array(1, LENGTH, 8, head_dim, dtype=dtype)
  k = array(1, LENGTH, 2, head_dim, dtype=dtype)
  lists = (array(1, 2, blocks, blocks), array(1, 2, blocks))
  fn = functools.partial(
    module.block_sparse_attention,
    block_q=block,
    block_kv=block,
    causal=True,
    scale=0.125,
  )
  return fn, (q, k, k, *lists, array(1), array(1))


def scores(module, window=16, over_queries="mean", length=LENGTH):
  count = length // window
  composites = array(1, count, 4, 128, dtype=jnp.float32)
  fn = functools.partial(
    module.composite_scores,
    window_q=window,
    window_kv=window,
    block_q=128,
    block_kv=128,
    causal=True,
    scale=0.125,
    over_queries=over_queries,
    parts=1,
  )
  counts = (array(1, count), array(1, count))
  return fn, (composites, composites, *counts, array(1))


def long_scores(module, dtype, stride, head_dim=128, causal=True):
  counts = (array(1, LENGTH // stride),) * 2
  q = array(1, LENGTH, 8, head_dim, dtype=dtype)
  k = array(1, LENGTH, 2, head_dim, dtype=dtype)
  fn = functools.partial(
    module.composite_scores,
    window_q=stride,
    window_kv=stride,
    block_q=128,
    block_kv=128,
    causal=causal,
    scale=0.01,
    over_queries="mean",
    parts=stride,
  )
  return fn, (q, k, *counts, array(1))


def columns(module, dtype):
  q = array(1, LENGTH // 20, 8, 128, dtype=dtype)
  k = array(1, LENGTH, 2, 128, dtype=dtype)
  fn = functools.partial(module.column_score_sampling, scale=0.125)
  return fn, (q, k, array(1, LENGTH // 20))


def selection(module, **budget):
  blocks = LENGTH // 128
  fn = functools.partial(
    module.block_selection,
    block_q=128,
    block_kv=128,
    causal=True,
    num_sink_blocks=1,
    num_local_blocks=1,
    **budget,
  )
  block_scores = array(1, 4, blocks, blocks, dtype=jnp.float32)
  mass_budget = array(4, dtype=jnp.float32)
  return fn, (block_scores, array(1), array(1), array(1), mass_budget)


def pooling(module, dtype, head_dim):
  x = array(1, LENGTH, 8, head_dim, dtype=dtype)
  fn = functools.partial(module.composite_pooling, window=16, head_group=4)
  return fn, (x, array(1))


def likelihood(**settings):
  fn = functools.partial(likelihood_triton.logistic_likelihood, **settings)
  shapes = [(569, 31), (1000, 31)]
  return fn, tuple(array(*x, dtype=jnp.float32) for x in shapes)


def tree_attention(
  dtype,
  q_len,
  tree_len,
  capacity=512,
  head_dim=64,
  batch=2,
  counted=False,
  flat=False,
):
  cache = array(batch, 2, capacity, head_dim, dtype=dtype)
  tree = array(batch, tree_len, 2, head_dim, dtype=dtype)
  q = array(batch, q_len, 6, head_dim, dtype=dtype)
  mask = array(batch, q_len, tree_len, dtype=jnp.bool_)
  fn = functools.partial(tree_triton.tree_attention, scale=0.125)
  more = (array(batch),) if counted else ()
  if flat:
    q, tree = (
      array(1, 80, 6, head_dim, dtype=dtype),
      array(1, 80, 2, head_dim, dtype=dtype),
    )
    more = array(batch), array(batch)
  return fn, (q, cache, cache, array(batch), tree, tree, mask, *more)


def top_log_probs(vocab_size, width):
  fn = functools.partial(top_triton.top_log_probs, width=width)
  return fn, (array(2, 8, vocab_size, dtype=jnp.float32),)


def head_rotation(batch, q_len, heads, head_dim, dtype, normed=True):
  channels, half = (heads + 4) * head_dim, head_dim // 2
  angle = array(1, q_len, 1, half, dtype=jnp.float32)
  fn = functools.partial(
    rotation_triton.head_rotation, num_heads=heads, num_kv_heads=2, eps=1e-6
  )
  scale = array(head_dim, dtype=dtype)
  more = (scale, scale) if normed else ()
  return fn, (array(batch, q_len, channels, dtype=dtype), angle, angle, *more)


def cache_append(count, batch, n, head_dim, dtype):
  buffers = (array(batch, 2, n + 96, head_dim, dtype=dtype),) * count
  new = (array(batch, n, 2, head_dim, dtype=dtype),) * count
  fn = functools.partial(append_triton.cache_append, num_slots=n)
  return fn, (buffers, new, array(batch))


TRITON = {
  "attention_bfloat16_128": attention(attention_triton, jnp.bfloat16, 128),
  "attention_float16_64": attention(attention_triton, jnp.float16, 64, 64),
  "attention_float32_256": attention(attention_triton, jnp.float32, 256),
  "scores": scores(scores_triton),
  "scores_max": scores(scores_triton, over_queries="max"),
  "scores_long": long_scores(scores_triton, jnp.bfloat16, 8),
  "scores_long_float16": long_scores(scores_triton, jnp.float16, 16, 64, False),
  "scores_long_float32": long_scores(scores_triton, jnp.float32, 4),
  "columns": columns(columns_triton, jnp.bfloat16),
  "selection_top_p": selection(selection_triton, top_k=None, max_blocks=32),
  "selection_top_k": selection(selection_triton, top_k=8, max_blocks=20),
  "likelihood": likelihood(),
  "likelihood_ieee": likelihood(tile=(32, 32, 4, 2, 4), products="ieee"),
  "step_bfloat16": tree_attention(jnp.bfloat16, 1, 1),
  "step_short_cache": tree_attention(jnp.bfloat16, 1, 1, capacity=128),
  "tree_float16": tree_attention(jnp.float16, 64, 64, head_dim=128),
  "tree_float32": tree_attention(jnp.float32, 8, 80),
  "tree_counted": tree_attention(jnp.bfloat16, 64, 64, 1408, counted=True),
  "tree_counted_float32": tree_attention(jnp.float32, 8, 8, counted=True),
  "tree_counted_full_card": tree_attention(
    jnp.bfloat16, 64, 64, batch=512, counted=True
  ),
  "tree_flat": tree_attention(jnp.bfloat16, 64, 64, 1408, flat=True),
  "tree_flat_full_card": tree_attention(
    jnp.bfloat16, 64, 64, batch=512, flat=True
  ),
  "append": cache_append(64, 16, 1, 64, jnp.bfloat16),
  "append_path": cache_append(4, 1, 17, 128, jnp.float32),
  "append_stretch": cache_append(16, 16, 257, 128, jnp.bfloat16),
  "rotation": head_rotation(16, 1, 10, 64, jnp.bfloat16),
  "rotation_float32": head_rotation(3, 37, 4, 256, jnp.float32, normed=False),
  "rotation_float16": head_rotation(1, 1, 1, 16, jnp.float16),
  "top": top_log_probs(4096, 8),
  "top_ragged": top_log_probs(1000, 3),
}
# With the number of Triton kernels in each.
KERNELS = dict.fromkeys(
  (
    "columns",
    "step_bfloat16",
    "tree_float16",
    "tree_float32",
    "tree_counted",
    "tree_counted_float32",
    "tree_flat",
  ),
  2,
)
TPU = {
  "attention_bfloat16_128": attention(attention_tpu, jnp.bfloat16, 128),
  "attention_bfloat16_64": attention(attention_tpu, jnp.bfloat16, 64, 64),
  "attention_float32_128": attention(attention_tpu, jnp.float32, 128),
  "attention_float16_256": attention(attention_tpu, jnp.float16, 256),
  # Long, so that one head's matrix of scores is far more than the temporaries.
  "scores": scores(scores_tpu, length=8 * LENGTH),
  "scores_coarse": scores(scores_tpu, window=32, length=8 * LENGTH),
  "scores_max": scores(scores_tpu, over_queries="max", length=8 * LENGTH),
  "columns_bfloat16": columns(columns_tpu, jnp.bfloat16),
  "columns_float32": columns(columns_tpu, jnp.float32),
  "pooling_bfloat16": pooling(pooling_tpu, jnp.bfloat16, 128),
  "pooling_float32": pooling(pooling_tpu, jnp.float32, 64),
}


def triton_modules(operation):
  """Bytecode of every Triton kernel inside an operation."""
  for region in operation.regions:
    for inner in (x.operation for block in region for x in block):
      yield from triton_modules(inner)
      if "gpu.triton" in str(inner.attributes.get("call_target_name", "")):
        yield inner.attributes["mhlo.backend_config"]["ir"].value_bytes


def verify(module):
  """Parses a module, which verifies it; JAX hands it to Triton unverified."""
  with ir.Context() as context, ir.Location.unknown():
    dialect.register_dialect(context)
    ir.Module.parse(module)


@pytest.mark.parametrize("capability", ahead_of_time.CARDS)
@pytest.mark.parametrize("name", TRITON)
def test_triton_kernel_lowers_for_cuda(name, capability):
  fn, shapes = TRITON[name]
  lowered = ahead_of_time.lower_for_cuda(fn, shapes, capability)
  modules = [*triton_modules(lowered.compiler_ir().operation)]
  assert len(modules) == KERNELS.get(name, 1)
  for module in modules:
    verify(module)


def test_the_matrix_of_composite_scores_is_never_an_array():
  def shapes_of(module, case=scores, **settings):
    fn, shapes = case(module, **settings)
    if module is scores_triton:
      lowered = ahead_of_time.lower_for_cuda(fn, shapes, 90)
    else:
      lowered = jax.jit(fn).lower(*shapes)
    return lowered.as_text()

  count = LENGTH // 16
  matrix = f"x{count}x{count}xf32>"
  assert matrix in shapes_of(scores_reference)
  assert matrix not in shapes_of(scores_triton)
  long = functools.partial(
    shapes_of, case=long_scores, dtype=jnp.bfloat16, stride=16
  )
  assert matrix in long(scores_reference)
  assert matrix not in long(scores_triton)


def test_a_module_that_triton_would_refuse_is_seen():
  # What a loop up to jnp.where(..., 1, 0) lowers to in JAX 0.11.2.
  loop = """
    %from = arith.constant 0 : i32
    %to = arith.constant 1 : {}
    "scf.for"(%from, %to, %from) ({{
    ^bb0(%index: i32):
      scf.yield
    }}) : (i32, {}, i32) -> ()
  """
  verify(loop.format("i32", "i32"))
  with pytest.raises(ir.MLIRError, match=r"have same type"):
    verify(loop.format("i1", "i1"))


def test_triton_refuses_older_cards_and_other_devices():
  fn, shapes = TRITON["attention_float16_64"]
  with pytest.raises(NotImplementedError, match=r"needs compute cap.*got 7\.5"):
    jax.eval_shape(functools.partial(fn, capability=75), *shapes)
  if jax.default_backend() == "cpu":
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA GPU"):
      jax.eval_shape(fn, *shapes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      dict(block_q=96),
      r"triton needs block_q to be a power of two.*block_q=96",
    ),
    (dict(block_kv=8), r"triton needs block_kv to be a power of two"),
  ],
)
def test_triton_names_what_it_cannot_serve(changes, message):
  fn, shapes = TRITON["attention_float16_64"]
  fn = functools.partial(fn, interpret=True, **changes)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(fn, *shapes)


@pytest.mark.skipif(
  sys.platform != "linux" or platform.machine() != "x86_64",
  reason="libtpu has no build for this machine",
)
def test_libtpu_is_there_where_the_dev_extra_installs_it():
  # Without it no TPU kernel is compiled, and the tests below only skip.
  assert ahead_of_time.has_libtpu(), needs_libtpu.kwargs["reason"]


@pytest.mark.optimised
@needs_libtpu
@pytest.mark.parametrize(
  ("tpu", "name"),
  [
    *[("v5e", name) for name in TPU],
    ("v6e", "attention_bfloat16_128"),
    ("v6e", "scores"),
    ("v6e", "columns_bfloat16"),
    ("v6e", "pooling_bfloat16"),
  ],
)
def test_tpu_kernel_compiles(tpu, name):
  fn, shapes = TPU[name]
  compiled = ahead_of_time.compile_for_tpu(fn, shapes, tpu)
  assert "tpu_custom_call" in compiled.as_text()
  inputs = sum(x.size * x.dtype.itemsize for x in shapes)
  memory = compiled.memory_analysis()
  assert memory.argument_size_in_bytes >= inputs
  # Layout changes of inputs and results, never a matrix of all scores.
  assert memory.temp_size_in_bytes < 4 * inputs
  if not name.startswith("pooling"):
    assert memory.temp_size_in_bytes < bytes_of_a_matrix(shapes) // 2
  assert compiled.cost_analysis()["flops"] > 0


def bytes_of_a_matrix(shapes):
  """float32 scores of one head: every row of the first array by the second."""
  return 4 * shapes[0].shape[1] * shapes[1].shape[1]


@pytest.mark.optimised
@needs_libtpu
def test_a_stored_matrix_of_scores_is_seen_in_a_tpu_program():
  # Of 4,096 tokens it would stay on the chip.
  reference, shapes = scores(scores_reference, length=4 * LENGTH)

  def fn(*args, compile_only):
    del compile_only
    return reference(*args)

  memory = ahead_of_time.compile_for_tpu(fn, shapes, "v5e").memory_analysis()
  assert memory.temp_size_in_bytes > bytes_of_a_matrix(shapes)


@pytest.mark.optimised
@needs_libtpu
def test_tpu_attention_memory_is_linear_in_length():
  def temporaries(length):
    fn, shapes = TPU["attention_bfloat16_128"]
    factor = length // LENGTH
    shapes = [
      array(1, factor * x.shape[1], *x.shape[2:], dtype=x.dtype)
      if x.ndim == 4 and x.dtype == jnp.bfloat16
      else x
      for x in shapes
    ]
    blocks = length // 128
    shapes[3:5] = array(1, 2, blocks, 32), array(1, 2, blocks)
    memory = ahead_of_time.compile_for_tpu(fn, shapes, "v5e").memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes

  assert temporaries(4 * LENGTH) < 4.5 * temporaries(LENGTH)


def test_tpu_kernels_refuse_other_devices():
  fn, shapes = TPU["attention_bfloat16_128"]
  if jax.default_backend() != "tpu":
    with pytest.raises(NotImplementedError, match=r"mosaic_tpu needs a TPU"):
      jax.eval_shape(fn, *shapes)
