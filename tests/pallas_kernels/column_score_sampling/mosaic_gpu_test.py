# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels: their numbers interpreted, and that they lower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.column_score_sampling import mosaic_gpu
from tests import helpers
from tests.pallas_kernels.column_score_sampling import suite

SCALE = 0.125
# A version, so that an interpreter that goes or is renamed fails a test.
needs_interpreter = pytest.mark.skipif(
  jax.__version_info__ < (0, 11),
  reason="JAX interprets Mosaic GPU kernels as of 0.11",
)


def make_case(*, batch, num_rows, kv_len, group, head_dim, dtype, ascending):
  rng = np.random.default_rng(0)
  q = rng.standard_normal((batch, num_rows, group, head_dim))
  k = rng.standard_normal((batch, kv_len, 1, head_dim))
  last = rng.integers(-1, kv_len, (batch, num_rows)).astype(np.int32)
  if ascending:
    last = np.sort(last, axis=-1)
  return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(last)


def expected_scores(q, k, last):
  return suite.numpy_scores(
    q, k, last, causal=True, kv_len=k.shape[1], scale=SCALE
  )


@needs_interpreter
@pytest.mark.parametrize(
  ("sizes", "schedule"),
  [
    (  # several tiles of both, more steps than stages, a batch
      dict(batch=2, num_rows=150, kv_len=300, group=2, head_dim=128),
      dict(compute_wgs=2, stages=2),
    ),
    (
      dict(batch=1, num_rows=90, kv_len=150, group=3, head_dim=64),
      dict(compute_wgs=1, stages=2, tile=64),
    ),
  ],
)
def test_interpreted_matches_float64(sizes, schedule, capsys):
  ascending = sizes["batch"] == 2
  dtype = jnp.bfloat16 if ascending else jnp.float16
  arrays = make_case(**sizes, dtype=dtype, ascending=ascending)
  scores = mosaic_gpu.sample(
    *arrays,
    scale=SCALE,
    schedule=mosaic_gpu.Schedule(**schedule),
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )
  helpers.assert_same(scores, expected_scores(*arrays), 2e-6)
  assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("head_dim", mosaic_gpu.HEAD_DIMS)
def test_lowers_for_cuda(head_dim):
  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)

  fn = functools.partial(
    mosaic_gpu.sample, scale=SCALE, schedule=mosaic_gpu.Schedule()
  )
  traced = jax.jit(fn).trace(
    array(1, 820, 8, head_dim),
    array(1, 4096, 2, head_dim),
    array(1, 820, dtype=jnp.int32),
  )
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu") == 2


def test_refuses_other_devices():
  arrays = make_case(
    batch=1,
    num_rows=8,
    kv_len=16,
    group=1,
    head_dim=64,
    dtype=jnp.bfloat16,
    ascending=True,
  )
  if jax.default_backend() == "cpu":
    with pytest.raises(NotImplementedError, match="mosaic_gpu needs an NVIDIA"):
      mosaic_gpu.column_score_sampling(*arrays, scale=SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("dtype", "head_dim"), [("bfloat16", 128), ("float16", 64)]
)
def test_on_the_card(dtype, head_dim):
  arrays = make_case(
    batch=2,
    num_rows=700,
    kv_len=3000,
    group=4,
    head_dim=head_dim,
    dtype=jnp.dtype(dtype),
    ascending=dtype == "bfloat16",
  )
  op = jax.jit(
    functools.partial(
      mosaic_gpu.sample, scale=SCALE, schedule=mosaic_gpu.Schedule()
    )
  )
  scores = op(*arrays)
  helpers.assert_same(scores, expected_scores(*arrays), 2e-6)
  np.testing.assert_array_equal(np.asarray(scores), np.asarray(op(*arrays)))
