# SPDX-License-Identifier: Apache-2.0
"""composite_pooling on every back end, against means taken token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.composite_pooling import api, mosaic_tpu
from tests import helpers

# batch, len, heads, head_dim, window, head group, valid tokens
CASES = {
  "plain": (1, 256, 4, 16, 16, 1, None),
  "heads": (1, 300, 8, 128, 16, 4, None),
  "ragged": (2, 75, 4, 32, 8, 2, (75, 19)),
}


def numpy_means(x, window, head_group, valid):
  x = np.asarray(x, np.float64)
  batch, length, num_heads, head_dim = x.shape
  count = -(-length // window)
  means = np.zeros((batch, count, num_heads // head_group, head_dim))
  counts = np.zeros((batch, count), np.int32)
  for b, u, g in np.ndindex(means.shape[:3]):
    tokens = x[b, u * window : min((u + 1) * window, valid[b])]
    counts[b, u] = len(tokens)
    if len(tokens):
      heads = tokens[:, g * head_group : (g + 1) * head_group]
      means[b, u, g] = heads.mean((0, 1))
  return means, counts


class Suite:
  implementation: str

  @pytest.mark.parametrize("name", CASES)
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_matches_float64(self, name, dtype):
    batch, length, heads, head_dim, window, group, valid = CASES[name]
    x, _, _ = helpers.make_qkv(
      batch=batch,
      q_len=length,
      num_heads=heads,
      head_dim=head_dim,
      dtype=jnp.dtype(dtype),
    )
    valid = np.full(batch, length) if valid is None else np.asarray(valid)
    expected, expected_counts = numpy_means(x, window, group, valid)
    # What lies past the valid tokens may be anything.
    past = jnp.arange(length)[None, :] >= jnp.asarray(valid)[:, None]
    x = jnp.where(past[:, :, None, None], jnp.asarray(jnp.nan, x.dtype), x)
    means, counts = jax.jit(
      functools.partial(
        pallas_kernels.composite_pooling,
        window=window,
        head_group=group,
        length=jnp.asarray(valid, jnp.int32),
        implementation=self.implementation,
      )
    )(x)
    assert means.dtype == jnp.float32 and counts.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(counts), expected_counts)
    helpers.assert_same(means, expected, 1e-6)  # measured 1e-7


class TestReference(Suite):
  implementation = "reference"


class TestMosaicTpuInterpreted(Suite):
  implementation = "mosaic_tpu"

  @pytest.fixture(autouse=True)
  def interpret(self, monkeypatch):
    interpreted = functools.partial(
      mosaic_tpu.composite_pooling, interpret=True
    )
    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_tpu", interpreted)
