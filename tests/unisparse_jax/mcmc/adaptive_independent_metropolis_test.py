# SPDX-License-Identifier: Apache-2.0
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import (
  adaptive_independent_metropolis,
  estimates,
  expectations,
  independent_blocks,
  proposal_fits,
  proposals,
)

MEANS = np.array([[1.5, 0.0], [-0.5, 1.0]])
WEIGHTS = np.array([0.4, 0.6])
SPREADS = np.array([[[0.6, 0.2], [0.2, 0.5]], [[0.8, -0.3], [-0.3, 0.7]]])


# Of numpy arrays: nothing is factored inside the programs that hold it.
_CHOLS = np.linalg.cholesky(SPREADS)
_HUMPS = proposals.GaussianMixture(
  np.log(WEIGHTS), proposals.Gaussian(MEANS, _CHOLS, np.linalg.inv(_CHOLS))
)


def two_humps(x):
  """A skewed mixture of known moments."""
  return _HUMPS.logdensity(x)


def exact_moments():
  mean = WEIGHTS @ MEANS
  offset = MEANS - mean
  between = np.einsum("k,ki,kj->ij", WEIGHTS, offset, offset)
  return mean, np.einsum("k,kij->ij", WEIGHTS, SPREADS) + between


def start(variance=3.0):
  return proposals.gaussian(np.array([1.0, -1.0]), variance * np.eye(2))


FORWARD = proposal_fits.FitSettings(
  num_chains=100,
  num_steps=1000,
  heavy_weight=0.02,
  num_frozen_steps=100,
  max_weight_ratio=2.0,  # so that it warns
)


@pytest.fixture(scope="module")
def adapted_and_warnings():
  with jax.enable_x64(True), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = adaptive_independent_metropolis.adapt(
      jax.random.key(0), two_humps, start(), FORWARD
    )
  return result, caught


@pytest.fixture
def adapted(adapted_and_warnings):
  return adapted_and_warnings[0]


def test_forward_fit_is_the_best_gaussian(x64, adapted):
  """Moment matching is the minimiser of KL(pi || q) among Gaussians."""
  light, heavy = adapted.proposal.parts
  mean, covariance = exact_moments()
  # Measured: 0.016 and 0.021. With the heavy part's share of the target the
  # light part is narrower by a little.
  np.testing.assert_allclose(light.mean, mean, atol=0.06)
  np.testing.assert_allclose(light.covariance(), covariance, atol=0.08)
  assert not np.allclose(start().mean, mean, atol=0.5)
  np.testing.assert_allclose(heavy.base.covariance(), 2 * light.covariance())
  report = adapted.report
  assert report.acceptance_rate > 0.75  # measured: 0.78
  assert report.max_weight_ratio < 10
  assert report.acceptance_history[:50].mean() < report.acceptance_rate - 0.1
  assert 0 < report.kl_forward < 0.2
  assert 0 < report.kl_reverse < 0.2
  assert report.num_evaluations >= 1000 * 100


def test_no_bias_after_freezing(x64, adapted):
  """95% intervals of single chains cover at their rate."""
  functional = expectations.means_and_squares(2)
  run = independent_blocks.run_chains(
    jax.random.key(5),
    two_humps,
    adapted.proposal,
    jax.tree.map(
      lambda x: jnp.tile(x, (2, *(1,) * (x.ndim - 1))), adapted.state
    ),
    2000,
    functional=functional,
    block_size=50,
  )
  mean, covariance = exact_moments()
  exact = np.concatenate([mean, np.diagonal(covariance) + mean**2])
  pooled = estimates.estimate(run.carry)
  assert np.all(np.abs(pooled.mean - exact) < 4 * pooled.mcse)
  # Independent draws would need this many times the evaluations.
  assert np.median(pooled.ess) / pooled.num_draws > 1.5
  inside = []
  for chain in range(200):
    one = jax.tree.map(lambda x, c=chain: x[c], run.carry)
    result = estimates.estimate(one)
    inside.append(np.abs(result.mean - exact) < 1.96 * result.mcse)
  coverage = np.mean(inside)
  assert 0.91 < coverage < 0.98


def test_reverse_fit_of_a_gaussian_is_exact(x64):
  mean, covariance = exact_moments()
  target = proposals.gaussian(mean, covariance)
  settings = proposal_fits.FitSettings(
    objective="reverse", gradient_steps=800, learning_rate=0.05
  )
  fitted = proposal_fits.fit_reverse_kl(
    jax.random.key(0), target.logdensity, start(), settings
  )
  # Its gradients have no noise there.
  np.testing.assert_allclose(fitted.mean, mean, atol=1e-4)
  np.testing.assert_allclose(fitted.covariance(), covariance, atol=1e-4)


def test_a_mixture_beats_a_gaussian(x64, adapted):
  settings = proposal_fits.FitSettings(
    num_chains=100,
    num_steps=800,
    heavy_weight=0.02,
    num_frozen_steps=100,
  )
  mixture = proposal_fits.spread(jax.random.key(1), start(), 3)
  better = adaptive_independent_metropolis.adapt(
    jax.random.key(2), two_humps, mixture, settings
  )
  assert better.report.kl_forward < adapted.report.kl_forward / 2
  assert better.report.acceptance_rate > adapted.report.acceptance_rate


def test_a_dangerous_fit_is_told_with_numbers(adapted_and_warnings):
  result, caught = adapted_and_warnings
  (message,) = [str(w.message) for w in caught if w.category is RuntimeWarning]
  ratio = f"largest weight {result.report.max_weight_ratio:.3g} times the mean"
  assert ratio in message
  assert "limit 2" in message
  assert f"Pareto k {result.report.pareto_k:.2f}" in message
  assert f"acceptance {result.report.acceptance_rate:.2f}" in message


def test_pareto_k_is_that_of_the_tail():
  rng = np.random.default_rng(0)
  for shape in (0.25, 0.5, 0.9):
    # (1 - u)^-k has a generalised Pareto tail of shape k.
    log_weights = shape * rng.exponential(size=50_000)
    found = adaptive_independent_metropolis.pareto_k(log_weights)
    assert abs(found - shape) < 0.12
  equal = adaptive_independent_metropolis.pareto_k(np.zeros(100))
  assert equal == -np.inf


def test_judge_of_known_weights():
  rng = np.random.default_rng(0)
  shift = 0.5  # q = N(0, 1), pi = N(shift, 1): both KL are shift^2 / 2
  draws = rng.standard_normal(200_000)
  log_weights = shift * draws + 7.0
  log_weights[:10] = -np.inf
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    report = adaptive_independent_metropolis.judge(log_weights)
  np.testing.assert_allclose(report.kl_forward, shift**2 / 2, atol=0.01)
  np.testing.assert_allclose(report.kl_reverse, shift**2 / 2, atol=0.01)
  highest = np.exp(shift * draws.max() - shift**2 / 2)
  np.testing.assert_allclose(report.max_weight_ratio, highest, rtol=0.02)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"objective": "sideways"}, "objective must be a known name"),
    ({"num_chains": 0}, "num_chains must be an integer >= 1"),
    ({"step_power": 0.5}, r"step_power must be in \(0.5, 1\]"),
    ({"heavy_weight": 1.0}, r"heavy_weight must be in \[0, 1\)"),
    ({"learning_rate": 0.0}, "learning_rate must be > 0"),
  ],
)
def test_bad_settings(options, message):
  with pytest.raises(ValueError, match=message):
    proposal_fits.FitSettings(**options)


def test_a_start_of_another_kind_is_named():
  with pytest.raises(ValueError, match="start must be a Gaussian or"):
    adaptive_independent_metropolis.adapt(
      jax.random.key(0), two_humps, proposals.defensive(start())
    )
