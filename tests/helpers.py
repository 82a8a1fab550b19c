# SPDX-License-Identifier: Apache-2.0
"""Inputs and comparisons that several test files share."""

import jax.numpy as jnp
import numpy as np
import pytest

# Of an op with a Triton kernel; a test adds "interpreted" to the op's own.
TRITON_BACK_ENDS = (
  "reference",
  "xla",
  "interpreted",
  pytest.param("triton", marks=pytest.mark.gpu),
)


def make_qkv(
  *,
  batch=1,
  q_len=256,
  kv_len=None,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  dtype=jnp.float32,
  seed=0,
):
  """Random q, k, v, [batch, len, heads, head_dim]."""
  rng = np.random.default_rng(seed)
  kv_len = q_len if kv_len is None else kv_len

  def draw(length, heads):
    x = rng.standard_normal((batch, length, heads, head_dim))
    return jnp.asarray(x, jnp.float32).astype(dtype)

  return (
    draw(q_len, num_heads),
    draw(kv_len, num_kv_heads),
    draw(kv_len, num_kv_heads),
  )


def random_lists(
  rng, *, batch, num_mask_heads, num_q_blocks, num_kv_blocks, minimum=0
):
  """Random block lists: (indices, counts), some rows full, some near empty."""
  shape = (batch, num_mask_heads, num_q_blocks)
  indices = np.empty((*shape, num_kv_blocks), np.int32)
  for row in np.ndindex(shape):
    indices[row] = rng.permutation(num_kv_blocks)
  counts = rng.integers(minimum, num_kv_blocks + 1, shape).astype(np.int32)
  return jnp.asarray(indices), jnp.asarray(counts)


def relative_error(actual, expected):
  """2-norm of the difference over that of what is expected; NaN is infinite."""
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
  return np.inf if np.isnan(error) else error


def assert_same(actual, expected, tolerance):
  """Asserts a relative error, and that infinities stand in the same places."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  np.testing.assert_array_equal(np.isinf(actual), np.isinf(expected))
  finite = np.isfinite(expected)
  error = relative_error(
    np.where(finite, actual, 0.0), np.where(finite, expected, 0.0)
  )
  assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"


def numpy_attention(q, k, v, kept, scale=None):
  """float64 attention with an explicit mask; kept [batch, heads, q, kv]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  group = q.shape[2] // k.shape[2]
  k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  logits = scale * np.einsum("bihd,bjhd->bhij", q, k)
  logits = np.where(kept, logits, -np.inf)
  top = logits.max(-1, keepdims=True)
  top = np.where(np.isneginf(top), 0.0, top)
  p = np.exp(logits - top)
  total = p.sum(-1, keepdims=True)
  with np.errstate(divide="ignore"):
    lse = (np.log(total) + top)[..., 0]
  out = np.einsum("bhij,bjhd->bihd", p / np.where(total == 0, 1, total), v)
  return out, np.moveaxis(lse, 1, 2)
