# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from unisparse_jax.mcmc import proposals

MEAN = np.array([0.5, -1.0, 2.0])
FACTOR = np.array([[1.0, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.2, 1.5]])
COVARIANCE = FACTOR @ FACTOR.T
WEIGHTS = np.array([0.2, 0.5, 0.3])
MEANS = np.stack([MEAN, -MEAN, 0 * MEAN])
COVARIANCES = np.stack([COVARIANCE, 0.5 * COVARIANCE, np.eye(3)])


def make(name):
  """A proposal and its log-density written with scipy."""
  normal = scipy.stats.multivariate_normal(MEAN, COVARIANCE)
  heavy = scipy.stats.multivariate_t(MEAN, COVARIANCE, df=4.0)
  parts = [
    scipy.stats.multivariate_normal(m, c)
    for m, c in zip(MEANS, COVARIANCES, strict=True)
  ]
  safety = scipy.stats.multivariate_t(MEAN, 2 * COVARIANCE, df=5.0)
  gaussian = proposals.gaussian(MEAN, COVARIANCE)
  return {
    "gaussian": (gaussian, normal.logpdf),
    "student_t": (
      proposals.student_t(MEAN, COVARIANCE, 4.0),
      heavy.logpdf,
    ),
    "gaussian_mixture": (
      proposals.gaussian_mixture(WEIGHTS, MEANS, COVARIANCES),
      lambda x: np.log(
        sum(w * p.pdf(x) for w, p in zip(WEIGHTS, parts, strict=True))
      ),
    ),
    "defensive": (
      proposals.defensive(gaussian, weight=0.1),
      lambda x: np.log(0.9 * normal.pdf(x) + 0.1 * safety.pdf(x)),
    ),
  }[name]


NAMES = ("gaussian", "student_t", "gaussian_mixture", "defensive")


@pytest.mark.parametrize("name", NAMES)
def test_logdensity_is_that_of_scipy(x64, name):
  proposal, expected = make(name)
  points = np.random.default_rng(0).normal(size=(50, 3)) * 3
  actual = jax.vmap(proposal.logdensity)(jnp.asarray(points))
  np.testing.assert_allclose(actual, expected(points), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_the_logdensity(x64, name):
  proposal, _ = make(name)
  keys = jax.random.split(jax.random.key(0), 20_000)
  draws = np.asarray(jax.jit(jax.vmap(proposal.sample))(keys))
  mean, covariance = proposals.moments(proposal)
  # A wrong sign or a wrong factor shows in some direction's distribution.
  # E[q(X)^-1 g(X)] is the integral of g: here a standard normal density.
  log_q = np.asarray(jax.vmap(proposal.logdensity)(jnp.asarray(draws)))
  probe = scipy.stats.multivariate_normal(np.asarray(mean), 0.3 * COVARIANCE)
  ratio = np.exp(probe.logpdf(draws) - log_q)
  error = ratio.std() / np.sqrt(len(ratio))
  assert abs(ratio.mean() - 1) < 4 * error < 0.1
  spread = np.sqrt(np.diagonal(np.asarray(covariance)) / len(draws))
  assert np.all(np.abs(draws.mean(0) - mean) < 4 * spread)
  if name != "student_t":  # its fourth moment is infinite at 4 degrees
    np.testing.assert_allclose(
      np.cov(draws.T), covariance, atol=0.06 * np.max(covariance)
    )


def test_a_wrong_logdensity_is_seen(x64):
  proposal, _ = make("gaussian")
  wider = proposals.gaussian(MEAN, 1.1 * COVARIANCE)
  keys = jax.random.split(jax.random.key(0), 20_000)
  draws = jax.vmap(wider.sample)(keys)
  log_q = np.asarray(jax.vmap(proposal.logdensity)(draws))
  probe = scipy.stats.multivariate_normal(MEAN, 0.3 * COVARIANCE)
  ratio = np.exp(probe.logpdf(np.asarray(draws)) - log_q)
  error = ratio.std() / np.sqrt(len(ratio))
  assert abs(ratio.mean() - 1) > 4 * error


class Standard:
  """A standard normal with the methods of both libraries."""

  def sample(self, key=None, *, seed=None):
    return jax.random.normal(seed if key is None else key, (3,))

  def log_prob(self, x):
    return jnp.sum(jax.scipy.stats.norm.logpdf(x))


@pytest.mark.parametrize(
  "adapt", [proposals.from_distrax, proposals.from_numpyro]
)
def test_adapters(adapt):
  proposal = adapt(Standard())
  position = proposal.sample(jax.random.key(0))
  assert position.shape == (3,)
  assert proposal.logdensity(position) == Standard().log_prob(position)


def test_another_fit_does_not_compile_again(x64):
  traces = []

  @jax.jit
  def evaluate(proposal, position):
    traces.append(1)
    return proposal.logdensity(position)

  for name in ("gaussian", "defensive", "gaussian_mixture"):
    proposal, expected = make(name)
    moved = jax.tree.map(lambda x: x * 1.5, proposal)
    before = len(traces)
    first = evaluate(proposal, jnp.asarray(MEAN))
    second = evaluate(moved, jnp.asarray(MEAN))
    assert len(traces) == before + 1
    assert first != second
    np.testing.assert_allclose(first, expected(MEAN))


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: proposals.gaussian(MEAN, -COVARIANCE), "covariance must be pos"),
    (lambda: proposals.gaussian(MEAN, FACTOR), "covariance must be symmetric"),
    (
      lambda: proposals.gaussian(MEAN[:2], COVARIANCE),
      r"covariance must have shape \[dim, dim\]; got \(3, 3\); expected dim=2",
    ),
    (lambda: proposals.student_t(MEAN, COVARIANCE, 0.0), "dof must be > 0"),
    (
      lambda: proposals.gaussian_mixture([1.0, -1.0, 1.0], MEANS, COVARIANCES),
      "weights must be > 0",
    ),
    (
      lambda: proposals.defensive(make("gaussian")[0], weight=1.0),
      r"weight must be in \(0, 1\)",
    ),
    (
      lambda: proposals.defensive(proposals.from_numpyro(Standard())),
      "proposal must have known moments; got proposal=FunctionProposal",
    ),
    (
      lambda: proposals.moments(proposals.student_t(MEAN, COVARIANCE, 2.0)),
      "dof must be > 2",
    ),
    (lambda: proposals.mixture([], []), "parts must hold a proposal"),
  ],
)
def test_bad_arguments(build, message):
  with pytest.raises(ValueError, match=message):
    build()
