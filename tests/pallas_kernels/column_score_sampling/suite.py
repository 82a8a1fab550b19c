# SPDX-License-Identifier: Apache-2.0
"""Contract of column_score_sampling, run once for each back end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests import helpers

# name: batch, kv_len, heads, kv heads, head_dim, positions, causal, valid keys
CASES = {
  "strided": (1, 256, 4, 2, 16, range(7, 256, 8), True, None),
  "ragged": (2, 333, 4, 1, 32, (*range(0, 300, 7), 332), True, (333, 90)),
  "any_order": (1, 200, 2, 2, 16, (199, 3, -1, 77, 0, 150), True, None),
  "few_rows_many_keys": (1, 2048, 2, 1, 16, (2047, 1000, 5), True, 1500),
  "bidirectional": (1, 100, 2, 1, 64, range(40), False, 70),
}


def make_case(name, dtype=jnp.float32):
  """Arrays and settings of a case."""
  (
    batch,
    kv_len,
    num_heads,
    num_kv_heads,
    head_dim,
    positions,
    causal,
    valid,
  ) = CASES[name]
  positions = np.asarray(positions, np.int32)
  q, k, _ = helpers.make_qkv(
    batch=batch,
    q_len=positions.size,
    kv_len=kv_len,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    dtype=dtype,
  )
  arrays = (
    q,
    k,
    jnp.broadcast_to(jnp.asarray(positions), (batch, positions.size)),
  )
  valid = kv_len if valid is None else jnp.asarray(valid, jnp.int32)
  return arrays, dict(causal=causal, kv_len=valid)


def numpy_scores(q, k, positions, *, causal, kv_len, scale=None):
  """float64, from the definition."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  q, k, positions = (np.asarray(x) for x in (q, k, positions))
  q, k = q.astype(np.float64), k.astype(np.float64)
  k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
  logits = np.einsum("bihd,bjhd->bhij", q, k) * scale
  key = np.arange(k.shape[1])
  valid = np.broadcast_to(kv_len, (q.shape[0],))
  visible = (positions >= 0)[:, None, :, None] & (
    key < valid[:, None, None, None]
  )
  if causal:
    visible = visible & (key <= positions[:, None, :, None])
  top = np.where(visible, logits, -1e300).max(-1, keepdims=True)
  p = np.where(visible, np.exp(np.where(visible, logits - top, 0.0)), 0.0)
  total = p.sum(-1, keepdims=True)
  return (p / np.where(total == 0.0, 1.0, total)).sum(2)


# Relative error allowed, of inputs rounded alike; measured on CPU: 6e-7.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6}


class ColumnScoreSamplingSuite:
  """Every back end must pass it; a subclass names its `implementation`."""

  implementation: str

  def op(self, settings):
    """The op as a jitted function of its arrays."""
    return jax.jit(
      functools.partial(
        pallas_kernels.column_score_sampling,
        **settings,
        implementation=self.implementation,
      )
    )

  def run(self, arrays, settings):
    return self.op(settings)(*arrays)

  @pytest.mark.parametrize(
    ("name", "dtype"),
    [
      *[(name, "float32") for name in CASES],
      ("ragged", "bfloat16"),
      ("strided", "float16"),
    ],
  )
  def test_matches_float64(self, name, dtype):
    arrays, settings = make_case(name, jnp.dtype(dtype))
    scores = self.run(arrays, settings)
    expected = numpy_scores(*arrays, **settings)
    assert scores.shape == expected.shape and scores.dtype == jnp.float32
    helpers.assert_same(scores, expected, TOLERANCE[dtype])
    np.testing.assert_array_equal(np.asarray(scores)[expected == 0.0], 0.0)

  def test_tolerance_sees_one_dropped_row(self):
    arrays, settings = make_case("strided")
    expected = numpy_scores(*arrays, **settings)
    q, k, positions = arrays
    scores = self.run((q, k, positions.at[0, 5].set(-1)), settings)
    with pytest.raises(AssertionError):
      helpers.assert_same(scores, expected, TOLERANCE["float32"])

  def test_same_bits_twice_and_poison_beyond_the_last_key(self):
    (q, k, positions), settings = make_case("ragged", jnp.bfloat16)
    op = self.op(settings)
    first = op(q, k, positions)
    key = jnp.arange(k.shape[1])[None, :, None, None]
    valid = settings["kv_len"][:, None, None, None]
    poisoned = jnp.where(key < valid, k, jnp.bfloat16(1e30))
    second = op(q, poisoned, positions)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))

  def test_extreme_logits(self):
    (q, k, positions), settings = make_case("any_order")
    q = q * 1e4 / jnp.abs(q).max()
    scores = self.run((q, k, positions), settings)
    expected = numpy_scores(q, k, positions, **settings)
    helpers.assert_same(scores, expected, 1e-3)


class BriefSuite(ColumnScoreSamplingSuite):
  """Fewer cases, for the reference and what a CPU interprets slowly."""

  @pytest.mark.parametrize(
    ("name", "dtype"),
    [
      ("ragged", "bfloat16"),
      ("any_order", "float32"),
      ("few_rows_many_keys", "float16"),
    ],
  )
  def test_matches_float64(self, name, dtype):
    super().test_matches_float64(name, dtype)

  # The cases above see these too.
  test_extreme_logits = None
  test_tolerance_sees_one_dropped_row = None
