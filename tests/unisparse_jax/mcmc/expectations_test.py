# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from unisparse_jax.mcmc import expectations, proposals

MEAN = np.array([0.3, -0.7])
COVARIANCE = np.array([[0.8, 0.3], [0.3, 0.5]])
DESIGN = np.array([[1.0, 0.2], [-0.5, 1.0], [0.3, 0.7]])
RESPONSE = np.array([0.4, -1.0, 0.2])


def functionals():
  """One of each row of the table; made inside a test, in its dtype."""
  array = jnp.asarray
  return {
    "linear": expectations.Linear(array([[1.0, -2.0], [0.5, 0.0]])),
    "quadratic": expectations.Quadratic(
      array([[[1.0, 0.5], [0.5, -2.0]], [[0.0, 1.0], [0.0, 0.0]]])
    ),
    "squares": expectations.Squares(),
    "exponential": expectations.Exponential(array([[0.4, -0.8], [0.0, 0.3]])),
    "normal_cdf": expectations.NormalCdf(
      array([[1.0, -0.5], [0.3, 2.0]]), array([0.2, -0.4])
    ),
    "tail": expectations.Tail(
      array([[1.0, 0.0], [1.0, 1.0]]), array([0.9, -0.6])
    ),
    "likelihood": expectations.Likelihood(
      array(DESIGN), array(RESPONSE), array(0.6), array(-3.0)
    ),
    "stacked": expectations.means_and_squares(2),
  }


def grid_mean(functional, logdensity, half=9.0, points=301):
  """E_q F on a grid: an oracle that knows no closed form."""
  axis = np.linspace(-half, half, points)
  x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
  weights = np.exp(logdensity(x)) * (axis[1] - axis[0]) ** 2
  return weights @ np.asarray(jax.vmap(functional)(jnp.asarray(x)))


@pytest.mark.parametrize("name", list(functionals()))
def test_gaussian_rows_are_those_of_a_grid(x64, name):
  functional = functionals()[name]
  normal = scipy.stats.multivariate_normal(MEAN, COVARIANCE)
  expected = grid_mean(functional, normal.logpdf)
  actual = expectations.expectation(
    functional, proposals.gaussian(MEAN, COVARIANCE)
  )
  # A grid of step 0.06 places the edge of an indicator to half a step.
  tolerance = 2e-2 if name == "tail" else 1e-9
  np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)
  moved = expectations.expectation(
    functional, proposals.gaussian(MEAN * 1.02, COVARIANCE)
  )
  assert not np.allclose(moved, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "quadratic", "squares", "tail"])
def test_student_t_rows_are_those_of_draws(x64, name):
  functional = functionals()[name]
  proposal = proposals.student_t(MEAN, COVARIANCE, 9.0)
  actual = expectations.expectation(functional, proposal)
  mean, error = expectations.monte_carlo(
    jax.random.key(0), functional, proposal, 100_000
  )
  assert np.all(np.abs(actual - mean) < 4 * error)
  normal = expectations.expectation(functional, proposal.base)
  if name != "linear":  # the tails count
    assert np.any(np.abs(normal - mean) > 4 * error)


def test_tail_of_student_t(x64):
  proposal = proposals.student_t(MEAN, COVARIANCE, 3.0)
  functional = functionals()["tail"]
  scale = np.sqrt(np.einsum("pi,ij,pj->p", *[
    np.asarray(functional.slopes), COVARIANCE, np.asarray(functional.slopes)
  ]))  # fmt: skip
  centre = np.asarray(functional.slopes) @ MEAN
  expected = scipy.stats.t(3.0, centre, scale).sf(functional.thresholds)
  actual = expectations.expectation(functional, proposal)
  np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_mixtures_are_weighted_sums(x64):
  means, covariances = np.stack([MEAN, -MEAN]), np.stack([COVARIANCE] * 2)
  mixture = proposals.gaussian_mixture([0.3, 0.7], means, covariances)
  whole = proposals.defensive(mixture, weight=0.2, dof=6.0)
  functional = functionals()["stacked"]

  def of(q):
    return expectations.expectation(functional, q)

  parts = [of(proposals.gaussian(m, COVARIANCE)) for m in means]
  light = 0.3 * parts[0] + 0.7 * parts[1]
  np.testing.assert_allclose(of(mixture), light, rtol=1e-12)
  heavy = of(whole.parts[1])
  np.testing.assert_allclose(of(whole), 0.8 * light + 0.2 * heavy, rtol=1e-12)
  mean, covariance = proposals.moments(whole)
  np.testing.assert_allclose(of(whole)[:2], mean, rtol=1e-12)
  second = np.diagonal(covariance) + np.asarray(mean) ** 2
  np.testing.assert_allclose(of(whole)[2:], second, rtol=1e-12)


def test_marginal_likelihood_of_scipy(x64):
  functional = functionals()["likelihood"]
  actual = functional.log_under_gaussian(proposals.gaussian(MEAN, COVARIANCE))
  expected = scipy.stats.multivariate_normal(
    DESIGN @ MEAN, DESIGN @ COVARIANCE @ DESIGN.T + 0.36 * np.eye(3)
  ).logpdf(RESPONSE)
  np.testing.assert_allclose(actual + functional.log_scale, expected)


def test_monte_carlo_error_is_right(x64):
  proposal = proposals.gaussian(MEAN, COVARIANCE)
  functional = functionals()["exponential"]
  exact = expectations.expectation(functional, proposal)
  keys = jax.random.split(jax.random.key(1), 200)

  def estimate(k):
    return expectations.monte_carlo(
      k, functional, proposal, 2_000, batch_size=500
    )

  means, errors = jax.lax.map(estimate, keys)
  scores = (means - exact[None]) / errors
  np.testing.assert_allclose(scores.std(axis=0), 1.0, atol=0.2)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: expectations.expectation(
        functionals()["exponential"],
        proposals.student_t(MEAN, COVARIANCE, 5.0),
      ),
      "functional must have a known mean under the proposal; got "
      "functional=Exponential, proposal=StudentT",
    ),
    (
      lambda: expectations.expectation(
        jnp.sin, proposals.gaussian(MEAN, COVARIANCE)
      ),
      "functional must have a known mean",
    ),
    (
      lambda: expectations.expectation(
        functionals()["squares"], proposals.student_t(MEAN, COVARIANCE, 2.0)
      ),
      "dof must be > 2",
    ),
    (lambda: expectations.coordinates(0), "dim must be an integer >= 1"),
    (
      lambda: expectations.monte_carlo(
        jax.random.key(0), jnp.sin, None, 100, batch_size=30
      ),
      "num_draws must be a multiple of batch_size",
    ),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
