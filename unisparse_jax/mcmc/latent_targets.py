# SPDX-License-Identifier: Apache-2.0
"""Latent Gaussian models: Gaussian process and Cox process posteriors."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unisparse_jax.mcmc import checks, covariances, targets

# Titsias and Papaspiliopoulos's grid benchmark, after the Finnish pines.
COX_VARIANCE = 1.91
COX_RANGE = 1 / 33
COX_NUM_POINTS = 126


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LatentTarget:
  """exp(likelihood_fn(x)) N(x; 0, covariance).

  Attributes:
    name: for tables and records.
    dim: of x.
    likelihood_fn: x -> log-likelihood, nats.
    covariance: of the prior, one of `covariances`.
    observed: numbers of the coordinates of interest; None for all. A torus
      that embeds a grid has others.
    curvature_fn: x -> scalar for `gi_latent_gaussian`; None for its default.
    matrix: the prior's covariance as a matrix, where it was built.
    data: what was observed.
  """

  name: str
  dim: int
  likelihood_fn: Callable
  covariance: Any
  observed: np.ndarray | None = None
  curvature_fn: Callable | None = None
  matrix: Float[np.ndarray, "dim dim"] | None = None
  data: np.ndarray | None = None

  def logdensity_fn(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
    """Log posterior, unnormalised."""
    white = self.covariance.to_eigen(x)
    return self.likelihood_fn(x) - 0.5 * jnp.sum(
      white**2 / self.covariance.values
    )

  def white_logdensity_fn(self, white: Float[Array, " dim"]):
    """Log posterior of x = U sqrt(values) white, standard normal a priori."""
    return self.likelihood_fn(self.from_white(white)) - 0.5 * jnp.sum(white**2)

  def from_white(self, white: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """x of prior covariance from standard normal noise."""
    return self.covariance.from_eigen(jnp.sqrt(self.covariance.values) * white)


def squared_exponential(
  inputs: Any, *, variance: float, length: float, jitter: float = 1e-8
) -> Float[np.ndarray, "rows rows"]:
  """variance exp(-|a - b|^2 / (2 length^2)), plus jitter on the diagonal."""
  inputs = np.asarray(inputs, np.float64)
  squares = np.sum(inputs**2, axis=1)
  distance = squares[:, None] + squares[None] - 2 * inputs @ inputs.T
  kernel = variance * np.exp(-np.maximum(distance, 0) / (2 * length**2))
  return kernel + jitter * np.eye(len(inputs))


def gp_classification(
  inputs: Any,
  labels: Any,
  *,
  variance: float = 2.0,
  length: float | None = None,
  dtype: Any = None,
  name: str = "gp_classification",
) -> LatentTarget:
  """Latent values of a Gaussian process with logistic labels.

  Args:
    inputs: [num_rows, num_columns]; standardised here.
    labels: [num_rows] of 0 and 1.
    variance: of the squared-exponential kernel.
    length: of the kernel; default the root of the number of columns.
    dtype: of the computations.
    name: of the target.
  """
  inputs, labels = np.asarray(inputs, np.float64), np.asarray(labels)
  checks.check_shape("labels", labels, ("rows",), (inputs.shape[0],))
  found = sorted(set(np.unique(labels).tolist()))
  checks.require(found == [0, 1], "labels", "be 0 and 1", found)
  inputs = (inputs - inputs.mean(0)) / inputs.std(0)
  length = length or math.sqrt(inputs.shape[1])
  matrix = squared_exponential(inputs, variance=variance, length=length)
  covariance = covariances.dense(matrix, dtype=dtype)
  sign = jnp.asarray(2.0 * labels - 1, covariance.values.dtype)

  def likelihood_fn(x):
    return jnp.sum(targets.log_sigmoid(sign * x))

  return LatentTarget(
    name=name,
    dim=len(labels),
    likelihood_fn=likelihood_fn,
    covariance=covariance,
    matrix=matrix,
    data=labels,
  )


def gp_regression(
  inputs: Any,
  *,
  noise: float = 0.01,
  variance: float = 1.0,
  length: float | None = None,
  seed: int = 0,
  dtype: Any = None,
) -> LatentTarget:
  """Latent values of a Gaussian process seen in Gaussian noise, simulated.

  The posterior is Gaussian: `gi_latent_gaussian` accepts every proposal.

  Args:
    inputs: [num_rows, num_columns]; standardised here.
    noise: variance of the observations.
    variance: of the squared-exponential kernel.
    length: of the kernel; default the root of the number of columns.
    seed: of the simulated data.
    dtype: of the computations.
  """
  checks.check_open_interval("noise", noise, 0, math.inf)
  inputs = np.asarray(inputs, np.float64)
  inputs = (inputs - inputs.mean(0)) / inputs.std(0)
  length = length or math.sqrt(inputs.shape[1])
  matrix = squared_exponential(inputs, variance=variance, length=length)
  covariance = covariances.dense(matrix, dtype=dtype)
  rng = np.random.default_rng(seed)
  white = rng.standard_normal((2, len(inputs)))
  latent = np.linalg.cholesky(matrix) @ white[0]
  data = latent + math.sqrt(noise) * white[1]
  observed = jnp.asarray(data, covariance.values.dtype)

  def likelihood_fn(x):
    return -0.5 * jnp.sum((x - observed) ** 2) / noise

  return LatentTarget(
    name="gp_regression",
    dim=len(inputs),
    likelihood_fn=likelihood_fn,
    covariance=covariance,
    matrix=matrix,
    data=data,
  )


def log_gaussian_cox(
  side: int,
  *,
  embedding: str = "torus",
  seed: int = 0,
  dtype: Any = None,
) -> LatentTarget:
  """Log-Gaussian Cox process on a grid of side x side cells, simulated.

  Counts in a cell are Poisson(exp(x + mu) / side^2), mu = log 126 - 1.91 / 2,
  with covariance 1.91 exp(-33 distance / side), distance in cells.

  Args:
    side: cells along each axis.
    embedding: "torus": x lives on a torus of 2 side x 2 side cells, whose
      window of side x side cells is observed and has exactly the model's law;
      memory is linear in the number of cells. "dense": x is the grid alone,
      and its covariance is factored, O(side^6) once.
    seed: of the simulated counts.
    dtype: of the computations.
  """
  checks.check_positive_int("side", side)
  checks.check_choice("embedding", embedding, ("torus", "dense"))
  span = side * COX_RANGE

  def kernel(i, j):
    return COX_VARIANCE * np.exp(-np.sqrt(i**2 + j**2) / span)

  torus = covariances.circulant(2 * side, 2 * side, kernel, dtype=dtype)
  window = np.zeros((2 * side, 2 * side), bool)
  window[:side, :side] = True
  observed = np.flatnonzero(window)
  mean = math.log(COX_NUM_POINTS) - COX_VARIANCE / 2
  # Simulated on the torus in numpy's float64, the same for both embeddings.
  rng = np.random.default_rng(seed)
  noise = np.fft.fft2(rng.standard_normal((2 * side, 2 * side)))
  spectrum = np.maximum(np.asarray(torus.spectrum, np.float64), 0)
  field = np.fft.ifft2(np.sqrt(spectrum) * noise).real.ravel()[observed]
  rate = np.exp(field + mean) / side**2
  counts = rng.poisson(rate)
  num_cells = side * side
  log_rate = mean - math.log(num_cells)
  if embedding == "dense":
    i, j = (
      x.ravel() for x in np.meshgrid(*[np.arange(side)] * 2, indexing="ij")
    )
    matrix = kernel(i[:, None] - i[None], j[:, None] - j[None])
    covariance = covariances.dense(matrix, dtype=dtype)
    seen = jnp.asarray(counts, covariance.values.dtype)

    def likelihood_dense(x):
      return jnp.sum(seen * x - jnp.exp(x + log_rate))

    return LatentTarget(
      name=f"cox_{side}_dense",
      dim=num_cells,
      likelihood_fn=likelihood_dense,
      covariance=covariance,
      matrix=matrix,
      data=counts,
    )
  seen = jnp.asarray(counts.reshape(side, side), torus.spectrum.dtype)

  def cells(x):
    return x.reshape(2 * side, 2 * side)[:side, :side]

  def likelihood_fn(x):
    return jnp.sum(seen * cells(x) - jnp.exp(cells(x) + log_rate))

  def curvature_fn(x):
    # Of the observed cells: the others have none.
    return jnp.mean(jnp.exp(cells(x) + log_rate))

  return LatentTarget(
    name=f"cox_{side}_torus",
    dim=4 * num_cells,
    likelihood_fn=likelihood_fn,
    covariance=torus,
    observed=observed,
    curvature_fn=curvature_fn,
    data=counts,
  )
