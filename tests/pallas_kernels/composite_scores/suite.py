# SPDX-License-Identifier: Apache-2.0
"""Contract of composite_scores, run once for each back end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests import helpers

# name: batch, q_len, kv_len, heads, kv heads, head group, head_dim, windows,
# blocks, causal, q_offset, valid keys
CASES = {
  "square": (1, 512, 512, 4, 2, 2, 16, (16, 16), (64, 64), True, 0, None),
  "no_grouping": (2, 256, 256, 4, 2, 1, 32, (8, 4), (64, 32), True, 0, None),
  "ragged": (2, 200, 333, 2, 1, 2, 16, (8, 8), (32, 64), True, 133, (333, 90)),
  "hidden": (1, 64, 256, 2, 2, 1, 16, (8, 8), (32, 32), True, -40, None),
  "bidirectional": (1, 130, 77, 2, 2, 1, 16, (4, 8), (32, 32), False, 0, 70),
}


def make_case(name):
  """Composites, counts and settings of a case."""
  (
    batch,
    q_len,
    kv_len,
    num_heads,
    num_kv_heads,
    head_group,
    head_dim,
    (window_q, window_kv),
    (block_q, block_kv),
    causal,
    q_offset,
    valid,
  ) = CASES[name]
  q, k, _ = helpers.make_qkv(
    batch=batch,
    q_len=q_len,
    kv_len=kv_len,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
  )
  valid = kv_len if valid is None else jnp.asarray(valid, jnp.int32)
  # Means of noise are small: scale them up to a peaked softmax.
  q, q_counts = pallas_kernels.composite_pooling(
    q, window=window_q, head_group=head_group
  )
  k, k_counts = pallas_kernels.composite_pooling(
    k, window=window_kv, length=valid
  )
  arrays = (8.0 * q, 2.0 * k, q_counts, k_counts)
  settings = dict(
    window_q=window_q,
    window_kv=window_kv,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    q_offset=q_offset,
  )
  return arrays, settings


# name: batch, q_len, kv_len, heads, kv heads, head_dim, stride, blocks, causal,
# q_offset, valid keys
LONG_CASES = {
  "square": (1, 512, 512, 4, 2, 16, 8, (64, 64), True, 0, None),
  "ragged": (2, 200, 360, 2, 1, 32, 4, (32, 64), True, 133, (333, 90)),
  "hidden": (1, 64, 256, 2, 2, 16, 8, (32, 32), True, -40, None),
  "bidirectional": (1, 136, 80, 2, 2, 8, 4, (32, 32), False, 0, 70),
}


def make_long_case(name, dtype=jnp.float32):
  """Tokens, a tile of them a composite; a tile counts whole or not at all."""
  (
    batch,
    q_len,
    kv_len,
    num_heads,
    num_kv_heads,
    head_dim,
    stride,
    (block_q, block_kv),
    causal,
    q_offset,
    valid,
  ) = LONG_CASES[name]
  q, k, _ = helpers.make_qkv(
    batch=batch,
    q_len=q_len,
    kv_len=kv_len,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    dtype=dtype,
  )
  valid = np.broadcast_to(kv_len if valid is None else valid, (batch,))
  tile = stride * np.arange(kv_len // stride)
  k_counts = np.where(tile < valid[:, None], stride, 0)
  q_counts = np.full((batch, q_len // stride), stride)
  arrays = (q, k, *(jnp.asarray(x, jnp.int32) for x in (q_counts, k_counts)))
  settings = dict(
    window_q=stride,
    window_kv=stride,
    block_q=block_q,
    block_kv=block_kv,
    causal=causal,
    q_offset=q_offset,
    parts=stride,
    scale=2.0 / stride,
  )
  return arrays, settings


def numpy_scores(
  q,
  k,
  q_counts,
  k_counts,
  *,
  window_q,
  window_kv,
  block_q,
  block_kv,
  causal,
  q_offset,
  over_queries="mean",
  parts=1,
  scale=None,
):
  """float64, one composite query at a time."""
  q, k, q_counts, k_counts = (np.asarray(x) for x in (q, k, q_counts, k_counts))
  q, k = q.astype(np.float64), k.astype(np.float64)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  # [batch, num_composites, num_groups, parts, head_dim]
  q, k = (
    np.moveaxis(x.reshape(x.shape[0], -1, parts, *x.shape[2:]), 2, 3)
    for x in (q, k)
  )
  q, k = (x.reshape(*x.shape[:3], -1) for x in (q[:, :, :, ::-1], k))
  batch, num_q, num_groups, _ = q.shape
  per_k = num_groups // k.shape[2]
  scores = np.zeros(
    (
      batch,
      num_groups,
      -(-num_q * window_q // block_q),
      -(-k.shape[1] * window_kv // block_kv),
    )
  )
  for b, g, u in np.ndindex(batch, num_groups, num_q):
    visible = k_counts[b] > 0
    if causal:
      last = q_offset + u * window_q + q_counts[b, u] - 1
      visible &= np.arange(k.shape[1]) * window_kv <= last
    if not visible.any():
      continue
    logits = k[b, :, g // per_k] @ q[b, u, g] * scale
    logits = np.where(visible, logits - logits[visible].max(), -np.inf)
    weight = k_counts[b] * np.exp(logits)
    row = u * window_q // block_q
    in_row = np.arange(num_q) * window_q // block_q == row
    by_block = np.zeros(scores.shape[3])
    np.add.at(by_block, np.arange(k.shape[1]) * window_kv // block_kv, weight)
    by_block /= weight.sum()
    if over_queries == "mean":
      by_block *= q_counts[b, u] / q_counts[b, in_row].sum()
      scores[b, g, row] += by_block
    elif q_counts[b, u]:
      scores[b, g, row] = np.maximum(scores[b, g, row], by_block)
  return scores


class CompositeScoresSuite:
  """Every back end must pass it; a subclass names its `implementation`."""

  implementation: str
  tolerance = 2e-6  # measured on CPU: 3e-7

  def op(self, settings):
    """The op as a jitted function of its arrays."""
    return jax.jit(
      functools.partial(
        pallas_kernels.composite_scores,
        **settings,
        implementation=self.implementation,
      )
    )

  def run(self, arrays, settings):
    return self.op(settings)(*arrays)

  @pytest.mark.parametrize("name", CASES)
  def test_matches_float64(self, name):
    arrays, settings = make_case(name)
    scores = self.run(arrays, settings)
    expected = numpy_scores(*arrays, **settings)
    assert scores.shape == expected.shape and scores.dtype == jnp.float32
    helpers.assert_same(scores, expected, self.tolerance)
    np.testing.assert_array_equal(np.asarray(scores)[expected == 0.0], 0.0)

  @pytest.mark.parametrize("name", ["ragged", "bidirectional"])
  def test_largest_of_the_queries(self, name):
    arrays, settings = make_case(name)
    settings["over_queries"] = "max"
    expected = numpy_scores(*arrays, **settings)
    helpers.assert_same(self.run(arrays, settings), expected, self.tolerance)

  # Of the second, batch and key groups are both more than one.
  @pytest.mark.parametrize(
    ("name", "over_queries"), [("ragged", "max"), ("no_grouping", "mean")]
  )
  def test_means_in_bfloat16(self, name, over_queries):
    (q, k, *counts), settings = make_case(name)
    arrays = (q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), *counts)
    settings["over_queries"] = over_queries
    expected = numpy_scores(*arrays, **settings)
    # Products of bfloat16 are exact in float32.
    helpers.assert_same(self.run(arrays, settings), expected, 1e-5)

  @pytest.mark.parametrize("name", LONG_CASES)
  def test_long_matches_float64(self, name):
    arrays, settings = make_long_case(name)
    scores = self.run(arrays, settings)
    expected = numpy_scores(*arrays, **settings)
    assert scores.shape == expected.shape and scores.dtype == jnp.float32
    helpers.assert_same(scores, expected, self.tolerance)
    np.testing.assert_array_equal(np.asarray(scores)[expected == 0.0], 0.0)

  def test_long_in_bfloat16_and_the_largest(self):
    arrays, settings = make_long_case("ragged", jnp.bfloat16)
    settings["over_queries"] = "max"
    scores = self.run(arrays, settings)
    # Products of bfloat16 are exact in float32.
    helpers.assert_same(scores, numpy_scores(*arrays, **settings), 1e-5)

  def test_long_of_equal_scores(self):
    (q, k, *counts), settings = make_long_case("square")
    scores = np.asarray(self.run((q, jnp.ones_like(k), *counts), settings))
    # A row sees as many composites of every block before its own.
    for row in range(scores.shape[2]):
      before = scores[:, :, row, :row]
      np.testing.assert_array_equal(
        before, np.broadcast_to(before[..., :1], before.shape)
      )

  def test_long_sees_one_vector_in_the_wrong_place(self):
    (q, k, *counts), settings = make_long_case("square")
    expected = self.run((q, k, *counts), settings)
    k = k.at[:, 8:16].set(k[:, 15:7:-1])
    with pytest.raises(AssertionError):
      helpers.assert_same(
        self.run((q, k, *counts), settings), expected, self.tolerance
      )

  def test_tolerance_sees_one_hidden_composite(self):
    arrays, settings = make_case("square")
    expected = self.run(arrays, settings)
    q, k, q_counts, k_counts = arrays
    scores = self.run((q, k, q_counts, k_counts.at[0, 3].set(0)), settings)
    with pytest.raises(AssertionError):
      helpers.assert_same(scores, expected, self.tolerance)

  def test_hidden_rows_are_zero(self):
    arrays, settings = make_case("hidden")
    totals = np.asarray(self.run(arrays, settings)).sum(-1)
    # The first 40 queries stand before every key.
    np.testing.assert_array_equal(totals[:, :, 0], 0.0)
    np.testing.assert_allclose(totals[:, :, 1], 0.75, rtol=1e-5)

  def test_same_bits_twice(self):
    arrays, settings = make_case("ragged")
    op = self.op(settings)
    first, second = op(*arrays), op(*arrays)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))

  def test_extreme_logits(self):
    (q, k, *counts), settings = make_case("square")
    q *= 1e4 / jnp.abs(q).max()
    scores = self.run((q, k, *counts), settings)
    expected = numpy_scores(q, k, *counts, **settings)
    helpers.assert_same(scores, expected, max(1e-3, 10 * self.tolerance))

  def test_offset_may_be_traced(self):
    arrays, settings = make_case("square")
    expected = self.run(arrays, settings)
    offset = jnp.full((1,), settings.pop("q_offset"), jnp.int32)

    @jax.jit
    def run(arrays, offset):
      return self.run(arrays, dict(settings, q_offset=offset))

    helpers.assert_same(run(arrays, offset), expected, self.tolerance)


class BriefSuite(CompositeScoresSuite):
  """Fewer cases, for the reference and what a CPU interprets slowly."""

  @pytest.mark.parametrize("name", ["ragged", "bidirectional"])
  def test_matches_float64(self, name):
    super().test_matches_float64(name)

  # The cases above see these too.
  test_offset_may_be_traced = None
  test_same_bits_twice = None
  test_tolerance_sees_one_hidden_composite = None
  test_extreme_logits = None
  test_long_sees_one_vector_in_the_wrong_place = None
