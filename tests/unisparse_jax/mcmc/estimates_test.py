# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from tests.unisparse_jax.mcmc import accumulators_test
from unisparse_jax.mcmc import chain_data, estimates

ALL = (*estimates.METHODS, (0.9, 0.4))


def correlated(seed, num_chains, num_batches, batch_size=5, weight=1.0):
  """F = 7 + slow part + terms; the terms' means over a batch explain it."""
  rng = np.random.default_rng(seed)
  length = num_batches * batch_size
  terms = rng.standard_normal((num_chains, length, 2, 3))
  noise = 0.3 * rng.standard_normal((num_chains, length, 3))
  values = 7 + noise + weight * (terms[:, :, 0] + 0.5 * terms[:, :, 1])
  return np.concatenate([values[:, :, None], terms], axis=2)


@pytest.mark.parametrize("cv_coef", ALL)
def test_coefficients_and_means(cv_coef, x64):
  values = correlated(0, 40, 20)
  filled = accumulators_test.fill(values, 5)
  result = estimates.estimate(filled, cv_coef)
  plain = values[:, :, 0].mean((0, 1))
  np.testing.assert_allclose(result.plain_mean, plain, rtol=1e-12)
  if not isinstance(cv_coef, str):
    expected = plain - (0.9 * values[:, :, 1] + 0.4 * values[:, :, 2]).mean(
      (0, 1)
    )
    np.testing.assert_allclose(result.mean, expected, rtol=1e-12)
    return
  np.testing.assert_allclose(result.cv_coef[0], 1, atol=0.15)
  np.testing.assert_allclose(result.cv_coef[1], 0.5, atol=0.15)
  # True factor: (1 + 0.25 + 0.09) / 0.09 = 15.
  assert np.all((result.factor > 6) & (result.factor < 35))
  error = 0.3 / np.sqrt(40 * 100)
  np.testing.assert_allclose(result.mcse, error, rtol=0.5)
  assert np.all(np.abs(result.mean - 7) < 5 * error)
  np.testing.assert_allclose(result.variance, 1.34, rtol=0.1)
  assert np.all(np.abs(result.r_hat - 1) < 0.02)
  assert result.num_draws == 4000


def test_least_squares_is_the_regression_of_numpy(x64):
  values = correlated(1, 4, 10)
  result = estimates.estimate(
    accumulators_test.fill(values, 5),
    estimates.LEAST_SQUARES,
    cross_fit=False,
  )
  flat = values.reshape(-1, 3, 3)
  for f in range(3):
    design = np.concatenate([np.ones((len(flat), 1)), flat[:, 1:, f]], axis=1)
    solution = np.linalg.lstsq(design, flat[:, 0, f], rcond=None)[0]
    np.testing.assert_allclose(result.cv_coef[:, f], solution[1:], rtol=1e-9)
    np.testing.assert_allclose(result.mean[f], solution[0], rtol=1e-12)


def test_one_chain_is_cross_fitted_over_batches(x64):
  values = correlated(2, 1, 200)
  result = estimates.estimate(accumulators_test.fill(values, 5))
  assert np.all(np.isnan(result.r_hat))
  assert np.all((result.factor > 8) & (result.factor < 25))
  np.testing.assert_allclose(result.mcse, 0.3 / np.sqrt(1000), rtol=0.25)
  single = accumulators_test.fill(values, 5)
  squeezed = type(single)(
    *(
      type(x)(*(y[0] for y in x)) if isinstance(x, tuple) else x[0]
      for x in single
    )
  )
  np.testing.assert_array_equal(estimates.estimate(squeezed).mean, result.mean)


def test_mcse_says_what_repeats_show(x64):
  # Between-chain and batch-means errors against the spread of 300 repeats.
  filled = accumulators_test.fill(correlated(3, 300 * 8, 16), 5)
  means, between, batch = [], [], []
  for repeat in range(300):
    eight = slice(8 * repeat, 8 * repeat + 8)
    part = jax.tree.map(lambda x, eight=eight: x[eight], filled)
    result = estimates.estimate(part, mcse=estimates.BATCH_MEANS)
    means.append(result.mean)
    batch.append(result.mcse)
    between.append(estimates.estimate(part, mcse=estimates.BETWEEN_CHAINS).mcse)
  spread = np.std(means, axis=0, ddof=1)
  rms = lambda x: np.sqrt(np.mean(np.square(x), axis=0))  # noqa: E731
  np.testing.assert_allclose(rms(batch), spread, rtol=0.15)
  np.testing.assert_allclose(rms(between), spread, rtol=0.15)


def test_useless_terms_are_not_chosen(x64):
  useful, useless = correlated(4, 20, 20), correlated(5, 20, 20, weight=0.0)
  candidates = {
    "both": estimates.Candidate(terms=(0, 1)),
    "first": estimates.Candidate(terms=(0,)),
    "fixed": estimates.Candidate(terms=(0, 1), cv_coef=(1.0, 0.5)),
    "wrong": estimates.Candidate(terms=(0, 1), cv_coef=(-1.0, 1.0)),
  }
  filled = accumulators_test.fill(useful, 5)
  choice = estimates.choose(filled, candidates)
  assert set(choice.chosen) <= {"both", "fixed"}
  best = np.min(list(choice.variances.values()), axis=0)
  assert np.all(best < 0.15) and np.all(choice.variances["wrong"] > 1.5)
  for f, name in enumerate(choice.chosen):
    alone = estimates.estimate(
      filled, candidates[name].cv_coef, terms=candidates[name].terms
    )
    assert choice.estimate.mean[f] == alone.mean[f]
  never = estimates.choose(accumulators_test.fill(useless, 5), candidates)
  assert np.all(never.variances["wrong"] > 5)
  assert np.all(np.min(list(never.variances.values()), axis=0) > 0.8)
  assert "wrong" not in never.chosen and "fixed" not in never.chosen
  assert np.all(never.estimate.factor > 0.9)


def test_other_terms_compete(x64):
  # Terms that explain everything, in an accumulator of their own.
  values = correlated(9, 20, 20)
  noise = values[:, :, 0] - values[:, :, 1] - 0.5 * values[:, :, 2] - 7
  better = np.concatenate([values, noise[:, :, None]], axis=2)
  filled = accumulators_test.fill(values, 5)
  choice = estimates.choose(
    filled,
    {"both": estimates.Candidate(terms=(0, 1))},
    others={"more": accumulators_test.fill(better, 5)},
  )
  assert choice.chosen == ["more"] * 3
  assert np.all(np.isnan(choice.estimate.cv_coef))
  assert np.all(choice.estimate.factor > 1e6)


def test_chains_that_did_not_mix_keep_their_plain_mean(x64):
  # Within each chain the term explains F; between chains it adds variance.
  rng = np.random.default_rng(10)
  values = correlated(10, 20, 20)
  values[:, :, 1] += 10 * rng.standard_normal((20, 1, 3))
  choice = estimates.choose(
    accumulators_test.fill(values, 5),
    {"first": estimates.Candidate(terms=(0,))},
  )
  assert choice.chosen == ["plain"] * 3


def test_shared_terms_give_the_same_coefficients(x64):
  # Two functions and the same two terms, once apart and once joint.
  values = correlated(6, 30, 12)[..., :2]
  values[:, :, 1:] = values[:, :, 1:, :1]
  apart = estimates.estimate(accumulators_test.fill(values, 5))
  joint = np.concatenate([values[:, :, 0], values[:, :, 1:, 0]], axis=2)[
    ..., None
  ]
  joint = accumulators_test.fill(joint, 5)
  together = estimates.estimate(chain_data.split_shared(joint, 2))
  np.testing.assert_allclose(together.cv_coef, apart.cv_coef, rtol=1e-9)
  np.testing.assert_allclose(together.mean, apart.mean, rtol=1e-12)
  np.testing.assert_allclose(together.mcse, apart.mcse, rtol=1e-8)


def test_terms_without_variance_get_no_coefficient(x64):
  values = correlated(7, 20, 12)
  values[:, :, 2] = 0
  for method in estimates.METHODS:
    result = estimates.estimate(accumulators_test.fill(values, 5), method)
    assert np.all(result.cv_coef[1] == 0)
    assert np.all(np.isfinite(result.mean)) and np.all(result.mcse > 0)


def test_a_function_that_never_varied_has_no_effective_size(x64):
  values = correlated(7, 20, 12)
  values[..., 0] = 0
  result = estimates.estimate(accumulators_test.fill(values, 5))
  assert np.isnan(result.ess[0]) and np.isnan(result.plain_ess[0])
  assert np.all(np.isfinite(result.ess[1:])) and result.mean[0] == 0


def test_bad_arguments_are_named(x64):
  filled = accumulators_test.fill(correlated(8, 6, 4), 5)
  for settings, message in (
    (dict(cv_coef="ols"), r"cv_coef must be a known name"),
    (dict(cv_coef=(1.0,)), r"cv_coef must have one number for each term"),
    (dict(cv_coef="between_chains"), r"at least 10 chains"),
    (dict(terms=(0, 2)), r"terms must be different numbers.*0\.\.1"),
    (dict(mcse="iid"), r"mcse must be a known name"),
  ):
    with pytest.raises(ValueError, match=message):
      estimates.estimate(filled, **settings)
  one = accumulators_test.fill(correlated(8, 1, 4), 5)
  with pytest.raises(ValueError, match=r"mcse must be 'batch_means'"):
    estimates.estimate(one, mcse="between_chains")
  single = accumulators_test.fill(correlated(8, 2, 1), 5)
  with pytest.raises(ValueError, match=r"accumulator must hold at least 2"):
    estimates.estimate(single)
