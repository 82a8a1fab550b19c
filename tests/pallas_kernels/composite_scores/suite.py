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
):
  """float64, one composite query at a time."""
  q, k, q_counts, k_counts = (np.asarray(x) for x in (q, k, q_counts, k_counts))
  q, k = q.astype(np.float64), k.astype(np.float64)
  batch, num_q, num_groups, head_dim = q.shape
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
    logits = k[b, :, g // per_k] @ q[b, u, g] * head_dim**-0.5
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
