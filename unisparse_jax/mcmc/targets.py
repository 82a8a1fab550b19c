# SPDX-License-Identifier: Apache-2.0
"""Log-densities to sample from, with their moments where they are known."""

import csv
import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unisparse_jax.mcmc import checks, preconditioner


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Target:
  """A distribution of vectors.

  Attributes:
    name: for tables and records.
    dim: length of the vectors.
    logdensity_fn: vector -> unnormalised log-density, nats.
    start: a point of finite log-density.
    mean: of each coordinate; None where unknown.
    covariance: None where unknown.
    sample: (rng_key, num_draws) -> exact draws [num_draws, dim], or None.
    log_normalizer: log of the integral of exp(logdensity), or None.
    along: (centre, root), both numpy float64 -> a log-density of z, that of
      centre + root @ z without forming this vector, for `white_coordinates`;
      None where there is none.
  """

  name: str
  dim: int
  logdensity_fn: Callable
  start: Float[Array, " dim"]
  mean: np.ndarray | None = None
  covariance: np.ndarray | None = None
  sample: Callable | None = None
  log_normalizer: float | None = None
  along: Callable | None = None


def gaussian(
  mean: Any, covariance: Any, *, dtype: Any = None, name: str = "gaussian"
) -> Target:
  """N(mean, covariance).

  Args:
    mean: [dim].
    covariance: [dim, dim], symmetric positive definite.
    dtype: of the computations; default that of `mean` as JAX holds it.
    name: of the target.

  Raises:
    ValueError: shapes disagree, or no covariance.
  """
  mean64 = np.asarray(mean, np.float64)
  covariance64 = np.asarray(covariance, np.float64)
  checks.check_shape("mean", mean64, ("dim",), (None,))
  dim = mean64.shape[0]
  checks.check_shape("covariance", covariance64, ("dim", "dim"), (dim, dim))
  checks.check_covariance("covariance", covariance64)
  # By its eigenvectors, as `preconditioner.eigen` has them: exact to rounding
  # in its own eigenbasis, so that a condition number of 1e6 costs the square
  # root of it in digits.
  value, vector = np.linalg.eigh(covariance64)
  vector = preconditioner.orthonormal(vector)
  mean_ = jnp.asarray(mean64, dtype)
  dtype = mean_.dtype
  root = jnp.asarray(vector * np.sqrt(value), dtype)
  vectors, scale = (
    jnp.asarray(vector, dtype),
    jnp.asarray(np.sqrt(value), dtype),
  )

  def logdensity_fn(position):
    white = ((position - mean_) @ vectors) / scale
    return -0.5 * jnp.sum(white**2)

  def along(centre, root_):
    to_white = vector.T / np.sqrt(value)[:, None]
    offset = jnp.asarray(to_white @ (centre - mean64), dtype)
    matrix = jnp.asarray(to_white @ root_, dtype)
    return lambda z: -0.5 * jnp.sum((offset + matrix @ z) ** 2)

  def sample(rng_key, num_draws):
    white = jax.random.normal(rng_key, (num_draws, dim), dtype)
    return mean_[None] + white @ root.T

  return Target(
    name=name,
    dim=dim,
    logdensity_fn=logdensity_fn,
    start=mean_,
    mean=mean64,
    covariance=covariance64,
    sample=sample,
    log_normalizer=float(
      0.5 * (dim * math.log(2 * math.pi) + np.log(value).sum())
    ),
    along=along,
  )


def random_covariance(
  rng: np.random.Generator, dim: int, condition: float
) -> np.ndarray:
  """A covariance of random axes with log-spaced eigenvalues around 1."""
  checks.check_positive_int("dim", dim)
  checks.require(condition >= 1, "condition", "be >= 1", condition)
  axes, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
  half = 0.5 * math.log10(condition)
  value = np.logspace(-half, half, dim) if dim > 1 else np.ones(1)
  covariance = (axes * value) @ axes.T
  return (covariance + covariance.T) / 2


def student_t(degrees: float, dim: int = 1, *, dtype: Any = None) -> Target:
  """Independent standard Student-t coordinates.

  Args:
    degrees: of freedom, > 0.
    dim: coordinates.
    dtype: of the computations.
  """
  checks.check_open_interval("degrees", degrees, 0, math.inf)
  checks.check_positive_int("dim", dim)
  start = jnp.zeros((dim,), dtype)

  def logdensity_fn(position):
    return -0.5 * (degrees + 1) * jnp.sum(jnp.log1p(position**2 / degrees))

  def sample(rng_key, num_draws):
    return jax.random.t(rng_key, degrees, (num_draws, dim), start.dtype)

  log_one = (
    math.lgamma(degrees / 2)
    - math.lgamma((degrees + 1) / 2)
    + 0.5 * math.log(degrees * math.pi)
  )
  has_variance = degrees > 2
  return Target(
    name=f"student_t_{degrees:g}",
    dim=dim,
    logdensity_fn=logdensity_fn,
    start=start,
    mean=np.zeros(dim) if degrees > 1 else None,
    covariance=(
      np.eye(dim) * degrees / (degrees - 2) if has_variance else None
    ),
    sample=sample,
    log_normalizer=dim * log_one,
  )


def logistic_regression(
  features: Any,
  labels: Any,
  *,
  prior_scale: float = 1.0,
  intercept: bool = True,
  likelihood_fn: Callable | None = None,
  dtype: Any = None,
  name: str = "logistic_regression",
) -> Target:
  """Posterior of logistic regression with a N(0, prior_scale^2) prior.

  Columns are standardised; constant ones are dropped.

  Args:
    features: [num_rows, num_columns].
    labels: [num_rows] of 0 and 1.
    prior_scale: standard deviation of every coefficient; inf for a flat prior.
    intercept: whether a column of ones is put first.
    likelihood_fn: (signed, position) -> sum of log sigmoid(signed @ position),
      signed the columns with rows of label 0 negated; default this module's,
      `pallas_kernels.logistic_likelihood.log_likelihood` for thousands of
      chains on a GPU.
    dtype: of the computations.
    name: of the target.

  Raises:
    ValueError: shapes disagree, or labels that are not 0 and 1.
  """
  features = np.asarray(features, np.float64)
  labels = np.asarray(labels)
  checks.check_shape("features", features, ("rows", "columns"), (None, None))
  checks.check_shape("labels", labels, ("rows",), (features.shape[0],))
  found = sorted(set(np.unique(labels).tolist()))
  checks.require(found == [0, 1], "labels", "be 0 and 1", found)
  checks.require(prior_scale > 0, "prior_scale", "be > 0", prior_scale)
  scale = features.std(0)
  columns = (features - features.mean(0))[:, scale > 0] / scale[scale > 0]
  if intercept:
    columns = np.concatenate([np.ones((len(columns), 1)), columns], axis=1)
  # Rows with label 1 are as they are, others negated: one function serves both.
  signed64 = columns * (2.0 * labels - 1)[:, None]
  signed = jnp.asarray(signed64, dtype)
  precision = 0.0 if math.isinf(prior_scale) else prior_scale**-2

  likelihood_fn = likelihood_fn or _log_likelihood

  def logdensity_fn(position):
    fit = likelihood_fn(signed, position)
    return fit - 0.5 * precision * jnp.sum(position**2)

  def along(centre, root):
    # The centre is one more column, of coefficient 1.
    design = np.concatenate([signed64 @ root, (signed64 @ centre)[:, None]], 1)
    moved, root_ = jnp.asarray(design, dtype), jnp.asarray(root, dtype)
    centre_, one = jnp.asarray(centre, dtype), jnp.ones((1,), signed.dtype)

    def white_logdensity_fn(white):
      fit = likelihood_fn(moved, jnp.concatenate([white, one]))
      return fit - 0.5 * precision * jnp.sum((centre_ + root_ @ white) ** 2)

    return white_logdensity_fn

  return Target(
    name=name,
    dim=columns.shape[1],
    logdensity_fn=logdensity_fn,
    start=jnp.zeros((columns.shape[1],), signed.dtype),
    along=along,
  )


def _log_likelihood(signed, position):
  # So that logits of many chains are [chains, rows], in the gradient too. With
  # signed @ position a gradient took 14% longer (CPU, 100 chains, float64; 23%
  # in float32). On an H100, 10,000 chains: 5% longer on 2,000 rows, but 17%
  # shorter on 569; the kernel is faster than both there.
  return jnp.sum(log_sigmoid(position @ signed.T))


@jax.custom_jvp
def log_sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """log(1 / (1 + exp(-x))), and derivatives in the fewest operations.

  Value and derivative share one exponential, which does not overflow. Through
  JAX's own softplus a gradient of logistic regression took 2.6 times as long on
  a CPU (float64; 1.9 times in float32).
  """
  return jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x)))


@log_sigmoid.defjvp
def _log_sigmoid_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  return log_sigmoid(x), _sigmoid_of_minus(x) * tangent


@jax.custom_jvp
def _sigmoid_of_minus(x):
  small = jnp.exp(-jnp.abs(x))
  return jnp.where(x > 0, small, 1) / (1 + small)


@_sigmoid_of_minus.defjvp
def _sigmoid_of_minus_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  p = _sigmoid_of_minus(x)
  return p, -p * (1 - p) * tangent


def load_labelled(name: str) -> tuple[np.ndarray, np.ndarray]:
  """Features and 0/1 labels of a data set that scikit-learn ships.

  Args:
    name: "breast_cancer", "breast_cancer_mean" (the 10 columns of means),
      "digits_01" (images of 0 and 1), "diabetes" (response above its median),
      or the path of a CSV file with a header whose last column is the label.

  Raises:
    ValueError: unknown name, or a file that is no such table.
  """
  if name.endswith(".csv"):
    return _read_csv(pathlib.Path(name))
  from sklearn import datasets  # Optional: the `mcmc` extra.

  if name in ("breast_cancer", "breast_cancer_mean"):
    data = datasets.load_breast_cancer()
    columns = slice(None) if name == "breast_cancer" else slice(0, 10)
    return data.data[:, columns], data.target.astype(np.int64)
  if name == "digits_01":
    data = datasets.load_digits(n_class=2)
    return data.data, data.target.astype(np.int64)
  checks.check_choice(
    "name",
    name,
    ("breast_cancer", "breast_cancer_mean", "digits_01", "diabetes"),
  )
  data = datasets.load_diabetes()
  return data.data, (data.target > np.median(data.target)).astype(np.int64)


def load_logistic_regression(
  name: str, *, prior_scale: float = 1.0, dtype: Any = None
) -> Target:
  """`logistic_regression` on data of `load_labelled`."""
  features, labels = load_labelled(name)
  return logistic_regression(
    features, labels, prior_scale=prior_scale, dtype=dtype, name=name
  )


def _read_csv(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  with path.open(newline="", encoding="utf-8") as file:
    rows = list(csv.reader(file))[1:]
  try:
    table = np.array(rows, np.float64)
  except ValueError as error:
    raise ValueError(
      f"name must be a CSV file of numbers with a header; got name={path}: "
      f"{error}."
    ) from error
  labels = table[:, -1].astype(np.int64)
  return table[:, :-1], labels
