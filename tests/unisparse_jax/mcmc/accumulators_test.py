# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import accumulators, estimates

merge = jax.jit(accumulators.merge)


def rows(seed, num_chains, num_steps, num_terms=2, num_functions=3):
  """Correlated rows with means far from 0: [chains, steps, rows, functions]."""
  rng = np.random.default_rng(seed)
  shape = (num_chains, num_steps, 1 + num_terms, num_functions)
  noise = rng.standard_normal(shape)
  noise[:, :, 0] += noise[:, :, 1:].sum(2)
  noise[:, :, 0] += 7 + rng.standard_normal((num_chains, 1, num_functions))
  return noise


def fill(values, batch_size, products_of_terms=True):
  """Accumulators of chains, fed step by step."""
  return _fill(jnp.asarray(values), batch_size, products_of_terms)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fill(values, batch_size, products_of_terms):
  def one_step(accumulator, rows):
    terms = accumulators.Terms(rows[0], rows[1:])
    return accumulators.update(accumulator, terms), None

  def one_batch(accumulator, part):
    accumulator, _ = jax.lax.scan(one_step, accumulator, part)
    return accumulators.flush(accumulator), None

  def one_chain(chain):
    start = accumulators.init(
      chain[0, 0], chain.shape[1] - 1, products_of_terms=products_of_terms
    )
    parts = chain.reshape(-1, batch_size, *chain.shape[1:])
    return jax.lax.scan(one_batch, start, parts)[0]

  return jax.vmap(one_chain)(values)


def test_streaming_equals_batch(x64):
  values = rows(0, 4, 60)
  filled = fill(values, 5)
  mean = values.mean(1)
  np.testing.assert_allclose(filled.steps.mean, mean, rtol=1e-12)
  centred = values - mean[:, None]
  products = np.einsum("csip,csjp->cijp", centred, centred)
  np.testing.assert_allclose(filled.steps.products, products, rtol=1e-10)
  batch_means = values.reshape(4, 12, 5, 3, 3).mean(2)
  for fold in range(2):
    part = batch_means[:, fold::2]
    np.testing.assert_allclose(
      filled.batches.mean[:, fold], part.mean(1), rtol=1e-12
    )
    gap = part - part.mean(1, keepdims=True)
    np.testing.assert_allclose(
      filled.batches.products[:, fold],
      np.einsum("csip,csjp->cijp", gap, gap),
      rtol=1e-10,
      atol=1e-12,
    )
  assert np.all(np.asarray(filled.num_batches) == 12)


def test_merging_knows_no_order(x64):
  values = rows(1, 3, 40)
  parts = [
    jax.tree.map(lambda x: x[0], fill(values[:1, a:b], 5))
    for a, b in ((0, 10), (10, 30), (30, 40))
  ]
  whole = jax.tree.map(lambda x: x[0], fill(values[:1], 5))
  for a, b, c in ((0, 1, 2), (2, 0, 1)):
    left = merge(merge(parts[a], parts[b]), parts[c])
    right = merge(parts[a], merge(parts[b], parts[c]))
    for merged in (left, right):
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12),
        (merged.steps, merged.batches, merged.num_batches),
        (whole.steps, whole.batches, whole.num_batches),
      )
  filled = fill(values, 5)
  reduced = jax.jit(accumulators.reduce_chains)(filled.steps)
  flat = values.reshape(-1, 3, 3)
  np.testing.assert_allclose(reduced.mean, flat.mean(0), rtol=1e-12)
  gap = flat - flat.mean(0)
  np.testing.assert_allclose(
    reduced.products, np.einsum("sip,sjp->ijp", gap, gap), rtol=1e-10
  )
  empty = accumulators.init(jnp.zeros(3), 2)
  same = merge(empty, whole)
  np.testing.assert_array_equal(same.steps.mean, whole.steps.mean)
  np.testing.assert_array_equal(same.batches.products, whole.batches.products)


def test_float32_loses_no_digits_to_length():
  # 2^18 steps about 1000 with spread 1: plain float32 sums are off by 0.1 and
  # more; measured here: mean 3e-6, variance 2e-6 relative.
  rng = np.random.default_rng(2)
  values = (1000 + rng.standard_normal((1, 2**18, 1, 1))).astype(np.float32)
  filled = fill(values, 64)
  assert filled.steps.mean.dtype == jnp.float32
  exact = values.astype(np.float64)
  mean = float(filled.steps.mean[0, 0, 0]) + float(
    filled.steps.mean_low[0, 0, 0]
  )
  assert abs(mean - exact.mean()) < 2e-5
  variance = float(filled.steps.products[0, 0, 0, 0]) / (2**18 - 1)
  assert abs(variance / exact.var(ddof=1) - 1) < 1e-5
  naive = np.cumsum(values.ravel(), dtype=np.float32)[-1] / 2**18
  assert abs(float(naive) - exact.mean()) > 1e-3  # what is avoided


def test_products_of_terms_can_be_left_out(x64):
  values = rows(3, 2, 20)
  full, lean = fill(values, 5), fill(values, 5, products_of_terms=False)
  assert lean.steps.products.shape == (2, 1, 1, 3)
  np.testing.assert_allclose(
    lean.steps.products[:, 0, 0], full.steps.products[:, 0, 0], rtol=1e-12
  )
  np.testing.assert_array_equal(lean.batches.products, full.batches.products)
  with pytest.raises(ValueError, match=r"cv_coef must.*products_of_terms=True"):
    estimates.estimate(lean, estimates.LEAST_SQUARES)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match=r"num_terms must be >= 0"):
    accumulators.init(jnp.zeros(2), -1)
  with pytest.raises(ValueError, match=r"centre must have shape"):
    accumulators.init(jnp.zeros((2, 2)), 1)
