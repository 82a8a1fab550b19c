# SPDX-License-Identifier: Apache-2.0
"""Acceptance ratios against densities written out by scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.unisparse_jax.mcmc import forced
from unisparse_jax.mcmc import (
  adaptation,
  base,
  covariances,
  gi_hessian_mala,
  gi_latent_gaussian,
  gi_mala,
  gi_rwm,
  preconditioner,
  targets,
)

DIM = 4
STEP_SIZES = (0.4, 1.0, 1.7)


def covariance():
  return 1.7 * targets.random_covariance(np.random.default_rng(0), DIM, 30.0)


def low_rank():
  draws = np.random.default_rng(1).standard_normal((12, DIM)) * [1, 2, 3, 4]
  return preconditioner.low_rank(draws, 2)


PRECONDITIONERS = {
  "diagonal": lambda: preconditioner.diagonal([0.5, 1.0, 2.0, 0.3]),
  "dense": lambda: preconditioner.dense(covariance()),
  "eigen": lambda: preconditioner.eigen(covariance()),
  "low_rank": low_rank,
  "inverse_precision": lambda: preconditioner.InversePrecision(
    jnp.linalg.cholesky(jnp.linalg.inv(jnp.asarray(covariance())))
  ),
  "within": lambda: preconditioner.Within(
    preconditioner.dense(covariance()),
    preconditioner.diagonal([0.5, 1.0, 2.0, 0.3]),
  ),
}


def as_matrix(a):
  return np.asarray(jax.vmap(a.apply)(jnp.eye(DIM))).T


def log_normal(x, mean, matrix):
  return scipy.stats.multivariate_normal(mean, matrix).logpdf(x)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioners_are_what_they_say(name, x64):
  a = PRECONDITIONERS[name]()
  matrix = as_matrix(a)
  np.testing.assert_allclose(matrix, matrix.T, rtol=1e-10, atol=1e-12)
  root = np.asarray(jax.vmap(a.root)(jnp.eye(DIM))).T
  np.testing.assert_allclose(root @ root.T, matrix, rtol=1e-9, atol=1e-12)
  vector = jnp.arange(1.0, DIM + 1)
  np.testing.assert_allclose(a.whiten(a.root(vector)), vector, rtol=1e-9)
  np.testing.assert_allclose(a.diagonal(), np.diag(matrix), rtol=1e-9)
  rows, columns = jnp.array([0, 1, 3]), jnp.array([2, 1, 0])
  np.testing.assert_allclose(
    a.entries(rows, columns), matrix[rows, columns], rtol=1e-8, atol=1e-12
  )
  directions = np.random.default_rng(2).standard_normal((3, DIM))
  expected = np.einsum("pi,ij,pj->p", directions, matrix, directions)
  np.testing.assert_allclose(
    a.quadratic(jnp.asarray(directions)), expected, rtol=1e-9
  )
  if hasattr(a, "log_det_root"):
    np.testing.assert_allclose(
      2 * a.log_det_root(), np.linalg.slogdet(matrix)[1], rtol=1e-8
    )


@pytest.mark.parametrize(
  ("sampler", "name"),
  [
    ("gi_mala", "diagonal"),
    ("gi_mala", "dense"),
    ("gi_mala", "eigen"),
    ("gi_mala", "low_rank"),
    ("gi_rwm", "dense"),
    ("gi_rwm", "low_rank"),
  ],
)
def test_constant_preconditioners(sampler, name, x64):
  a = PRECONDITIONERS[name]()
  matrix, mean = as_matrix(a), np.linspace(-1, 1, DIM)
  module = {"gi_mala": gi_mala, "gi_rwm": gi_rwm}[sampler]
  kernel = module.build_kernel()
  grad = jax.grad(forced.curved)

  @jax.jit
  def one(x, white, gamma):
    more = (gamma, a) if sampler == "gi_mala" else (gamma, mean, a)
    state = module.init(x, forced.curved)
    return forced.step(kernel, state, white, forced.curved, *more)[1]

  def log_q(y, x, gamma):
    if sampler == "gi_mala":
      centre = x + gamma * matrix @ np.asarray(grad(jnp.asarray(x)))
    else:
      centre = (1 - gamma) * x + gamma * mean
    return log_normal(y, centre, gamma * (2 - gamma) * matrix)

  check_ratios(one, log_q, forced.curved)


def towards(one, x, y, gamma):
  """The step from x whose proposal is y: proposals are affine in the noise."""
  start = one(jnp.asarray(x), jnp.zeros(DIM), gamma).proposal
  root = np.stack(
    [one(jnp.asarray(x), e, gamma).proposal - start for e in jnp.eye(DIM)],
    axis=1,
  )
  return one(
    jnp.asarray(x), jnp.asarray(np.linalg.solve(root, y - start)), gamma
  )


def check_ratios(one, log_q, log_pi):
  """Ratio, detailed balance and noise of a sampler, at random points.

  Args:
    one: (x, white, step_size) -> info.
    log_q: (y, x, step_size) -> log-density of proposing y from x.
    log_pi: log-density of the target.
  """
  rng = np.random.default_rng(3)
  for gamma in STEP_SIZES:
    x, white = rng.standard_normal((2, DIM))
    info = one(jnp.asarray(x), jnp.asarray(white), gamma)
    y = np.asarray(info.proposal)
    forward = float(log_pi(jnp.asarray(x))) + log_q(y, x, gamma)
    backward = float(log_pi(jnp.asarray(y))) + log_q(x, y, gamma)
    np.testing.assert_allclose(
      info.log_ratio, backward - forward, rtol=1e-8, atol=1e-10
    )
    # Detailed balance: pi q alpha is the same in both directions.
    back = towards(one, y, x, gamma)
    np.testing.assert_allclose(
      forward + min(0.0, float(info.log_ratio)),
      backward + min(0.0, float(back.log_ratio)),
      rtol=1e-9,
    )
    # The noise: squared length of y under q is that of white.
    peak = log_q(np.asarray(info.proposal_mean), x, gamma)
    length = 2 * (peak - log_q(y, x, gamma))
    np.testing.assert_allclose(length, white @ white, rtol=1e-8)
    np.testing.assert_array_equal(info.position_prev, x)


def test_the_wrong_noise_is_seen(x64):
  # Noise of variance 2 step_size, as in the usual Langevin proposal.
  a = PRECONDITIONERS["dense"]()
  matrix = as_matrix(a)
  grad = jax.grad(forced.curved)
  kernel = gi_mala.build_kernel()

  @jax.jit
  def one(x, white, gamma):
    state = gi_mala.init(x, forced.curved)
    wide = white * jnp.sqrt(2 / (2 - gamma))
    return forced.step(kernel, state, wide, forced.curved, gamma, a)[1]

  def log_q(y, x, gamma):
    centre = x + gamma * matrix @ np.asarray(grad(jnp.asarray(x)))
    return log_normal(y, centre, gamma * (2 - gamma) * matrix)

  with pytest.raises(AssertionError, match="Not equal"):
    check_ratios(one, log_q, forced.curved)


@pytest.mark.parametrize("treatment", gi_hessian_mala.TREATMENTS)
def test_hessian(treatment, x64):
  concave = treatment == gi_hessian_mala.CHOLESKY
  settings = dict(sharpness=3.0, floor=0.05)

  def log_pi(x):  # with the last term no longer concave everywhere
    return forced.curved(x) + (0 if concave else jnp.sum(jnp.cos(2 * x)))

  kernel = gi_hessian_mala.build_kernel(treatment, **settings)
  init = gi_hessian_mala.build_init(treatment, **settings)

  # Coordinates change the digits, not the law of a treatment that is none.
  coordinates = PRECONDITIONERS["eigen"]() if concave else None

  @jax.jit
  def one(x, white, gamma):
    state = init(x, log_pi, coordinates)
    return forced.step(kernel, state, white, log_pi, gamma, coordinates)[1]

  grad, hessian = jax.jit(jax.grad(log_pi)), jax.jit(jax.hessian(log_pi))

  def log_q(y, x, gamma):
    values, vectors = np.linalg.eigh(-np.asarray(hessian(jnp.asarray(x))))
    if treatment == gi_hessian_mala.ABSOLUTE:
      values = np.maximum(np.abs(values), 0.05 * np.abs(values).max())
    elif treatment == gi_hessian_mala.SOFT_ABSOLUTE:
      values = values / np.tanh(3.0 * values)
    matrix = (vectors / values) @ vectors.T
    centre = x + gamma * matrix @ np.asarray(grad(jnp.asarray(x)))
    return log_normal(y, centre, gamma * (2 - gamma) * matrix)

  check_ratios(one, log_q, log_pi)


def latent_covariances():
  first = np.array([[1.0, 0.6], [0.6, 1.0]])
  second = np.array([[2.0, 0.5], [0.5, 1.0]])
  kernel = lambda i, j: np.exp(-0.7 * (i + j))  # noqa: E731
  return {
    "dense": covariances.dense(covariance()),
    "kronecker": covariances.kronecker(first, second),
    "circulant": covariances.circulant(4, 1, kernel),
    "torus": covariances.circulant(2, 2, kernel),
  }


@pytest.mark.parametrize("name", ["dense", "kronecker", "circulant", "torus"])
def test_latent_gaussian(name, x64):
  prior = latent_covariances()[name]
  matrix = np.asarray(
    jax.vmap(lambda e: prior.from_eigen(prior.values * prior.to_eigen(e)))(
      jnp.eye(DIM)
    )
  )
  np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
  if name == "kronecker":
    first = np.array([[1.0, 0.6], [0.6, 1.0]])
    second = np.array([[2.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(matrix, np.kron(first, second), rtol=1e-10)
  if name == "circulant":
    np.testing.assert_allclose(matrix[0], np.exp(-0.7 * np.array([0, 1, 2, 1])))
  counts = jnp.array([0.0, 2.0, 1.0, 4.0])

  def likelihood(x):
    return jnp.sum(counts * x - jnp.exp(x))

  def log_pi(x):
    white = jnp.linalg.solve(jnp.asarray(matrix), x)
    return likelihood(x) - 0.5 * x @ white

  kernel = gi_latent_gaussian.build_kernel()

  @jax.jit
  def one(x, white, gamma):
    state = gi_latent_gaussian.init(x, likelihood, prior)
    return forced.step(kernel, state, white, likelihood, gamma, prior)[1]

  grad = jax.jit(jax.grad(log_pi))

  def log_q(y, x, gamma):
    precision = np.linalg.inv(matrix) + np.mean(np.exp(x)) * np.eye(DIM)
    a = np.linalg.inv(precision)
    centre = x + gamma * a @ np.asarray(grad(jnp.asarray(x)))
    return log_normal(y, centre, gamma * (2 - gamma) * (a + a.T) / 2)

  check_ratios(one, log_q, log_pi)
  # The pieces that control variates use.
  shifted = covariances.InverseShifted(prior, jnp.asarray(0.8))
  exact = np.linalg.inv(np.linalg.inv(matrix) + 0.8 * np.eye(DIM))
  np.testing.assert_allclose(as_matrix(shifted), exact, rtol=1e-8, atol=1e-12)
  np.testing.assert_allclose(shifted.diagonal(), np.diag(exact), rtol=1e-8)
  rows, columns = jnp.array([0, 1]), jnp.array([3, 1])
  np.testing.assert_allclose(
    shifted.entries(rows, columns), exact[rows, columns], rtol=1e-8
  )
  np.testing.assert_allclose(
    shifted.quadratic(jnp.eye(DIM)), np.diag(exact), rtol=1e-8
  )


def test_bad_arguments_are_named():
  fn = forced.curved
  good = preconditioner.identity(2)
  x = jnp.zeros(2)
  for gamma in (0.0, 2.0, -1.0, np.nan):
    for make in (
      lambda g: gi_mala.as_top_level_api(fn, g, good),
      lambda g: gi_rwm.as_top_level_api(fn, g, x, good),
      lambda g: gi_hessian_mala.as_top_level_api(fn, g),
    ):
      with pytest.raises(ValueError, match=r"step_size must be in \(0, 2\)"):
        make(gamma)
  with pytest.raises(ValueError, match=r"preconditioner must have the size"):
    gi_mala.as_top_level_api(fn, 1.0, good).init(jnp.zeros(3))
  with pytest.raises(ValueError, match=r"preconditioner must have the size"):
    gi_rwm.as_top_level_api(fn, 1.0, jnp.zeros(3), good)
  with pytest.raises(ValueError, match=r"preconditioner must be symmetric"):
    preconditioner.dense(np.array([[1.0, 0.2], [0.0, 1.0]]))
  with pytest.raises(ValueError, match=r"preconditioner must be positive def"):
    preconditioner.eigen(np.array([[1.0, 2.0], [2.0, 1.0]]))
  with pytest.raises(ValueError, match=r"treatment must be a known name"):
    gi_hessian_mala.build_kernel("jitter")
  with pytest.raises(ValueError, match=r"kernel must have a spectrum"):
    covariances.circulant(
      8, 1, lambda i, j: np.where(i <= 1, 1.0 - 0.2 * i, 0.0) + 0 * j
    )
  prior = covariances.dense(np.eye(2))
  algorithm = gi_latent_gaussian.as_top_level_api(fn, 1.0, prior)
  with pytest.raises(ValueError, match=r"position must have shape.*dim=2"):
    algorithm.init(jnp.zeros(3))


def test_the_loop_names_bad_parameters(x64):
  fn, x = forced.curved, jnp.zeros((3, 2))
  good = preconditioner.identity(2)
  prior, wide = covariances.dense(np.eye(2)), covariances.dense(np.eye(3))
  narrow = preconditioner.identity(3)
  init = {
    gi_mala: lambda x: gi_mala.init(x, fn),
    gi_rwm: lambda x: gi_rwm.init(x, fn),
    gi_hessian_mala: lambda x: gi_hessian_mala.init(x, fn),
    gi_latent_gaussian: lambda x: gi_latent_gaussian.init(x, fn, prior),
  }
  size = r"preconditioner must have the size of position; got"
  for sampler, right, wrong, message in (
    (gi_mala, (good,), (narrow,), size),
    (gi_rwm, (x[0], good), (x[0], narrow), size),
    (gi_rwm, (x[0], good), (jnp.zeros(3), good), r"mean must have shape"),
    (gi_hessian_mala, (), (narrow,), size),
    (gi_latent_gaussian, (prior,), (wide,), r"position must have shape"),
  ):
    step = base.bind(sampler.build_kernel(), fn)
    state = jax.vmap(init[sampler])(x)
    for gamma in (0.0, 2.0, np.nan):
      with pytest.raises(ValueError, match=r"step_size must be in \(0, 2\)"):
        base.run_chains(
          jax.random.key(0), step, state, 100, parameters=(gamma, *right)
        )
    with pytest.raises(ValueError, match=message):
      base.run_chains(
        jax.random.key(0), step, state, 100, parameters=(1.0, *wrong)
      )
    with pytest.raises(ValueError, match=message):
      adaptation.adapt_step_size(jax.random.key(0), step, state, 10, rest=wrong)
