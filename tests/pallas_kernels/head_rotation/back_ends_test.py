# SPDX-License-Identifier: Apache-2.0
"""head_rotation on every back end that a CPU can run, and on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.head_rotation import api, triton

BACK_ENDS = (
  "reference",
  "interpreted",
  pytest.param("triton", marks=pytest.mark.gpu),
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  fn = functools.partial(triton.head_rotation, interpret=True)
  monkeypatch.setitem(api.IMPLEMENTATIONS, "interpreted", fn)


def make(batch, q_len, heads, kv_heads, head_dim, dtype, *, normed, rows=None):
  rng = np.random.default_rng(0)
  channels = (heads + 2 * kv_heads) * head_dim
  merged = 3 * rng.standard_normal((batch, q_len, channels))
  angle = rng.uniform(-4, 4, (rows or batch, q_len, 1, head_dim // 2))
  scales = [None, None]
  if normed:
    scales = [jnp.asarray(rng.uniform(0.5, 2, head_dim), dtype) for _ in "qk"]
  cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
  return jnp.asarray(merged, dtype), cos, sin, *scales


def by_numpy(merged, cos, sin, q_scale, k_scale, *, num_heads, num_kv_heads):
  """float64, by complex numbers; no rounding in between."""
  x = np.asarray(merged, np.float64)
  x = x.reshape(*x.shape[:2], num_heads + 2 * num_kv_heads, -1)
  q, k, v = np.split(x, [num_heads, num_heads + num_kv_heads], axis=2)
  turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
  out = []
  for x, scale in ((q, q_scale), (k, k_scale)):
    if scale is not None:
      length = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
      x = x / length * np.asarray(scale, np.float64)
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    out.append(np.concatenate([z.real, z.imag], axis=-1))
  return *out, v


@pytest.mark.parametrize("implementation", BACK_ENDS)
@pytest.mark.parametrize(
  ("sizes", "dtype", "settings"),
  [
    ((3, 1, 10, 2, 64), jnp.bfloat16, dict(normed=True)),
    ((2, 37, 4, 4, 32), jnp.float32, dict(normed=True, rows=1)),
    ((1, 5, 3, 1, 128), jnp.float32, dict(normed=False)),
    ((1, 1, 2, 1, 16), jnp.float16, dict(normed=True)),
  ],
)
def test_equals_numpy(implementation, sizes, dtype, settings):
  arrays = make(*sizes, dtype, **settings)
  heads = dict(num_heads=sizes[2], num_kv_heads=sizes[3])
  found = api.head_rotation(*arrays, **heads, implementation=implementation)
  # Twice rounded, after the norm and at the end; float32 sums of squares.
  error = 2.5 * float(jnp.finfo(dtype).eps)
  for x, wanted in zip(found, by_numpy(*arrays, **heads), strict=True):
    assert x.dtype == dtype and x.shape == wanted.shape
    size = np.abs(wanted).max()
    np.testing.assert_allclose(
      np.asarray(x, np.float64), wanted, rtol=0, atol=error * size
    )
  np.testing.assert_array_equal(
    found[2].reshape(*sizes[:2], -1), arrays[0][..., -sizes[3] * sizes[4] :]
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_is_the_reference_up_to_one_rounding(dtype):
  arrays = make(16, 1, 10, 2, 64, dtype, normed=True)
  found, wanted = (
    api.head_rotation(
      *arrays, num_heads=10, num_kv_heads=2, implementation=name
    )
    for name in ("interpreted", "reference")
  )
  for x, y in zip(found, wanted, strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    eps = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(x, y, rtol=eps, atol=eps * np.abs(y).max() / 4)


def test_a_second_call_outside_jit_compiles_nothing(monkeypatch):
  traced, kernel = [], triton._kernel

  def counting(*args, **kwargs):
    traced.append(1)
    return kernel(*args, **kwargs)

  monkeypatch.setattr(triton, "_kernel", counting)
  arrays = make(1, 11, 3, 2, 16, jnp.float32, normed=True)
  for _ in range(2):
    api.head_rotation(
      *arrays, num_heads=3, num_kv_heads=2, implementation="interpreted"
    )
  assert traced == [1]


def test_bad_arguments_are_named():
  arrays = make(2, 3, 4, 2, 16, jnp.float32, normed=True)
  heads = dict(num_heads=4, num_kv_heads=2)
  with pytest.raises(ValueError, match=r"channels of merged"):
    api.head_rotation(*arrays, num_heads=5, num_kv_heads=2)
  with pytest.raises(ValueError, match=r"^cos must have shape"):
    api.head_rotation(arrays[0], arrays[1][:, :2], *arrays[2:], **heads)
  with pytest.raises(ValueError, match=r"^k_scale must be given if q_scale is"):
    api.head_rotation(*arrays[:4], **heads)
  odd = make(1, 1, 2, 1, 24, jnp.float32, normed=False)
  with pytest.raises(NotImplementedError, match=r"got head_dim=24"):
    api.head_rotation(
      *odd, num_heads=2, num_kv_heads=1, implementation="interpreted"
    )


@pytest.mark.parametrize("implementation", BACK_ENDS)
@pytest.mark.parametrize("normed", [True, False])
def test_gradients_are_slopes(implementation, normed):
  arrays = make(1, 2, 2, 1, 16, jnp.float32, normed=normed)
  wanted = (0, 3, 4) if normed else (0,)
  weight = np.random.default_rng(1).standard_normal((3, 1, 2, 2, 16))

  def loss(*some):
    full = list(arrays)
    for index, x in zip(wanted, some, strict=True):
      full[index] = x
    out = api.head_rotation(
      *full, num_heads=2, num_kv_heads=1, implementation=implementation
    )
    return sum(
      jnp.sum(x * w[:, :, : x.shape[2]])
      for x, w in zip(out, weight, strict=True)
    )

  some = [arrays[index] for index in wanted]
  gradients = jax.grad(loss, argnums=tuple(range(len(some))))(*some)
  rng = np.random.default_rng(2)
  for index, (x, gradient) in enumerate(zip(some, gradients, strict=True)):
    step = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    ends = [
      loss(*some[:index], x + sign * 0.01 * step, *some[index + 1 :])
      for sign in (1, -1)
    ]
    slope = float(ends[0] - ends[1]) / 0.02
    np.testing.assert_allclose(np.sum(gradient * step), slope, rtol=5e-3)
