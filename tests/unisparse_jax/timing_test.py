# SPDX-License-Identifier: Apache-2.0
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax import timing


def _sleep(ms):
  def body(x):
    time.sleep(ms / 1e3)
    return x

  def fn(x):
    return jax.pure_callback(body, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

  return fn


def test_measures_the_call_and_not_the_compilation():
  def fn(x):
    time.sleep(0.2)  # while tracing only
    return _sleep(20)(x)

  result = timing.measure(fn, jnp.zeros(3), repeats=3, warmup=1)
  assert result.compile_s > 0.2
  assert 20 <= result.min_ms <= result.median_ms < 150
  assert result.repeats == 3
  assert result.spread >= 0


def test_counts_calls_and_takes_turns_among_inputs():
  seen = []

  def body(x):
    seen.append(float(x))
    return x

  def fn(x):
    return jax.pure_callback(body, jax.ShapeDtypeStruct((), jnp.float32), x)

  timing.measure(
    fn,
    jnp.float32(1),
    repeats=3,
    warmup=2,
    rotate=[(jnp.float32(2),), (jnp.float32(3),)],
  )
  assert seen == [1, 2, 3, 1, 2]


def test_accepts_a_jitted_function_and_pytrees():
  fn = jax.jit(lambda tree, b: tree["a"] @ b)
  result = timing.measure(fn, {"a": jnp.ones((4, 4))}, np.ones(4, np.float32))
  assert result.median_ms > 0


def test_peak_bytes_counts_temporaries():
  def fn(x):
    return jnp.sum(jnp.sort(x[:, None] + x[None, :], axis=0))

  n = 512
  peak = timing.measure(fn, jnp.ones(n), repeats=1, warmup=0).peak_bytes
  assert peak is not None
  assert n * n * 4 <= peak < 8 * n * n * 4


def test_device_without_a_count_has_no_peak():
  assert timing.device_peak_bytes() is None  # CPU


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"repeats": 0}, "repeats must be >= 1; got repeats=0"),
    ({"warmup": -1}, "warmup must be >= 0; got warmup=-1"),
    ({"rotate": [(jnp.ones(4),)]}, "rotate must hold tuples with the shapes"),
  ],
)
def test_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    timing.measure(jnp.sum, jnp.ones(3), **kwargs)


def test_a_compiled_program_is_timed_in_groups():
  compiled = jax.jit(_sleep(5)).lower(jnp.zeros(3)).compile()
  single = timing.measure_compiled(compiled, jnp.zeros(3), repeats=2)
  assert 5 <= single.min_ms < 100
  assert (single.repeats, single.compile_s) == (2, 0.0)
  grouped = timing.measure_compiled(
    compiled, jnp.zeros(3), repeats=1, group_ms=12.0
  )
  assert 5 <= grouped.median_ms < 100
  with pytest.raises(ValueError, match=r"repeats must be >= 1"):
    timing.measure_compiled(compiled, jnp.zeros(3), repeats=0)
