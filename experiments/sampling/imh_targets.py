# SPDX-License-Identifier: Apache-2.0
"""Posteriors of the independent-Metropolis experiment, some means exact."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unisparse_jax.mcmc import laplace, proposals, targets

SCHOOL_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SCHOOL_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One posterior.

  Attributes:
    name: for records.
    dim: coordinates.
    logdensity_fn: vector -> unnormalised log-density.
    start: Gaussian from which fits begin.
    has_mode: whether `start` is the Laplace approximation.
    moments: exact (E x, E x^2), [2 dim], with variances of both; None where
      only a long run can tell.
  """

  name: str
  dim: int
  logdensity_fn: Callable
  start: proposals.Gaussian
  has_mode: bool
  moments: tuple[np.ndarray, np.ndarray] | None = None


def make(name: str) -> Case:
  """The case of a name; ValueError for an unknown one."""
  if name.startswith("shift_"):
    return shifted_gaussian(float(name.removeprefix("shift_")))
  table = {
    "eight_schools_centred": lambda: eight_schools(centred=True),
    "eight_schools_noncentred": lambda: eight_schools(centred=False),
    "mixture_posterior": mixture_posterior,
    "gp_regression": gp_regression,
  }
  return table[name]() if name in table else logistic(name)


def shifted_gaussian(shift: float, dim: int = 3) -> Case:
  """N(0, I); `start` is it, shifted by `shift` along the first axis."""
  mean = jnp.zeros(dim).at[0].set(shift)
  one = np.ones(dim)
  return Case(
    name=f"shift_{shift:g}",
    dim=dim,
    logdensity_fn=lambda x: -0.5 * jnp.sum(jnp.square(x)),
    start=proposals.gaussian(mean, jnp.eye(dim)),
    has_mode=True,
    moments=(
      np.concatenate([0 * one, one]),
      np.concatenate([one, 2 * one]),
    ),
  )


def logistic(name: str) -> Case:
  """Logistic regression with N(0, 1) priors on data of scikit-learn."""
  target = targets.load_logistic_regression(name)
  fit = laplace.laplace(target.logdensity_fn, target.start)
  return Case(
    name=name,
    dim=target.dim,
    logdensity_fn=target.logdensity_fn,
    start=proposals.gaussian(fit.mean, fit.covariance),
    has_mode=True,
  )


def eight_schools(*, centred: bool, reference_draws: int = 1_000_000) -> Case:
  """Effects of eight schools: mu ~ N(0, 5^2), tau ~ half-Cauchy(5).

  Coordinates are mu, log tau, and either the effects theta_j or
  eta_j = (theta_j - mu) / tau. Source of data and model: Rubin (1981); Gelman
  et al., Bayesian Data Analysis, section 5.5.
  """
  effects, errors = jnp.asarray(SCHOOL_EFFECTS), jnp.asarray(SCHOOL_ERRORS)

  def logdensity_fn(x):
    mu, log_tau, rest = x[0], x[1], x[2:]
    tau = jnp.exp(log_tau)
    prior = -0.5 * jnp.square(mu / 5) - jnp.log1p(jnp.square(tau / 5)) + log_tau
    if centred:
      theta = rest
      eta = (theta - mu) / tau
      prior = prior - 8 * log_tau
    else:
      eta = rest
      theta = mu + tau * eta
    fit = jnp.sum(jnp.square((effects - theta) / errors))
    return prior - 0.5 * jnp.sum(jnp.square(eta)) - 0.5 * fit

  spread = [30.0] * 8 if centred else [1.0] * 8
  middle = [5.0] * 8 if centred else [0.0] * 8
  draws = eight_schools_draws(
    np.random.default_rng(0), reference_draws, centred
  )
  values = np.concatenate([draws, draws**2], axis=1)
  return Case(
    name=f"eight_schools_{'' if centred else 'non'}centred",
    dim=10,
    logdensity_fn=logdensity_fn,
    start=proposals.gaussian(
      jnp.asarray([5.0, 1.0, *middle]),
      jnp.diag(jnp.asarray([25.0, 1, *spread])),
    ),
    has_mode=False,
    moments=(values.mean(0), values.var(0)),
  )


def eight_schools_draws(
  rng: np.random.Generator, num_draws: int, centred: bool
) -> np.ndarray:
  """Exact independent draws, [num_draws, 10].

  log tau by inversion of its marginal on a grid; mu and theta are Gaussian
  given it.
  """
  y, s = np.array(SCHOOL_EFFECTS)[:, None], np.array(SCHOOL_ERRORS)[:, None]

  def conditional(tau):
    variance = s**2 + tau**2
    precision = (1 / variance).sum(0) + 1 / 25
    return variance, precision, (y / variance).sum(0) / precision

  log_tau = np.linspace(np.log(1e-5), np.log(1e3), 40_001)
  tau = np.exp(log_tau)
  variance, precision, mean = conditional(tau)
  density = -0.5 * (np.log(variance) + y**2 / variance).sum(0)
  density += 0.5 * mean**2 * precision - 0.5 * np.log(precision)
  density += -np.log1p((tau / 5) ** 2) + log_tau
  cdf = np.cumsum(np.exp(density - density.max()))
  drawn = np.interp(rng.random(num_draws), cdf / cdf[-1], log_tau)
  tau = np.exp(drawn)
  _, precision, mean = conditional(tau)
  mu = mean + rng.standard_normal(num_draws) / np.sqrt(precision)
  precision = 1 / s**2 + 1 / tau**2
  mean = (y / s**2 + mu / tau**2) / precision
  theta = mean + rng.standard_normal(mean.shape) / np.sqrt(precision)
  rest = theta if centred else (theta - mu) / tau
  return np.stack([mu, drawn, *rest], axis=1)


def mixture_posterior() -> Case:
  """Means of y ~ N(m1, 1) / 2 + N(m2, 1) / 2: two modes, labels switched.

  Thirty points simulated with m = (-0.8, 1.2); prior N(0, 3^2). Exact moments
  by a grid.
  """
  rng = np.random.default_rng(1)
  data = np.where(rng.random(30) < 0.5, -0.8, 1.2) + rng.standard_normal(30)

  def logdensity_fn(x):
    parts = -0.5 * jnp.square(jnp.asarray(data)[:, None] - x[None])
    prior = -0.5 * jnp.sum(jnp.square(x / 3))
    return jnp.sum(jax.nn.logsumexp(parts, axis=1)) + prior

  axis = np.linspace(-12, 12, 1201)
  grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
  level = np.asarray(
    jax.lax.map(logdensity_fn, jnp.asarray(grid), batch_size=9999)
  )
  weight = np.exp(level - level.max())
  weight /= weight.sum()
  values = np.concatenate([grid, grid**2], axis=1)
  mean = weight @ values
  return Case(
    name="mixture_posterior",
    dim=2,
    logdensity_fn=logdensity_fn,
    start=proposals.gaussian(jnp.zeros(2), 4.0 * jnp.eye(2)),
    has_mode=False,
    moments=(mean, weight @ (values - mean) ** 2),
  )


def gp_regression(num_data: int = 40) -> Case:
  """Log length scale, amplitude and noise of a Gaussian process, all unknown.

  Squared-exponential kernel; data simulated with (0.25, 1, 0.3) on [0, 1];
  priors N(log of these + 0.3, 0.7^2).
  """
  rng = np.random.default_rng(2)
  x = np.sort(rng.random(num_data))
  squares = (x[:, None] - x[None]) ** 2
  truth = np.log([0.25, 1.0, 0.3])
  cov = np.exp(-0.5 * squares / 0.25**2) + 0.3**2 * np.eye(num_data)
  y = jnp.asarray(np.linalg.cholesky(cov) @ rng.standard_normal(num_data))
  centre, squares = jnp.asarray(truth + 0.3), jnp.asarray(squares)

  def logdensity_fn(position: Float[Array, " 3"]) -> Float[Array, ""]:
    length, amplitude, noise = jnp.exp(position)
    kernel = jnp.square(amplitude) * jnp.exp(
      -0.5 * squares / jnp.square(length)
    )
    # The jitter is part of the model; it matters for no posterior draw.
    eye = jnp.eye(num_data, dtype=kernel.dtype)
    chol = jnp.linalg.cholesky(kernel + (jnp.square(noise) + 1e-8) * eye)
    white = jax.scipy.linalg.solve_triangular(chol, y, lower=True)
    fit = -0.5 * jnp.sum(jnp.square(white))
    fit = fit - jnp.sum(jnp.log(jnp.diagonal(chol)))
    return fit - 0.5 * jnp.sum(jnp.square((position - centre) / 0.7))

  mode = _maximise(logdensity_fn, centre)
  covariance = jnp.linalg.inv(-jax.hessian(logdensity_fn)(mode))
  return Case(
    name="gp_regression",
    dim=3,
    logdensity_fn=logdensity_fn,
    start=proposals.gaussian(mode, (covariance + covariance.T) / 2),
    has_mode=True,
  )


def _maximise(logdensity_fn: Callable, start: Any) -> Any:
  """A mode of a density that need not be log-concave."""
  import scipy.optimize

  value = jax.jit(jax.value_and_grad(lambda x: -logdensity_fn(x)))
  found = scipy.optimize.minimize(
    lambda x: tuple(np.asarray(v, np.float64) for v in value(jnp.asarray(x))),
    np.asarray(start),
    jac=True,
  )
  return jnp.asarray(found.x)
