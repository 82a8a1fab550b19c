# SPDX-License-Identifier: Apache-2.0
"""Posteriors by name, each with the Gaussian-invariant sampler that fits it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unisparse_jax import mcmc

_MALA = mcmc.gi_mala.build_kernel()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
  """A posterior and how it is sampled.

  Attributes:
    name: of the posterior.
    target: `targets.Target` or `latent_targets.LatentTarget`.
    step: (rng_key, state, step_size, *rest) -> (state, info).
    init: vector -> state.
    rest: parameters after step_size.
    start: (rng_key, num_chains) -> [num_chains, dim], near the posterior.
    reference: step_size -> `poisson.Reference`.
    hooks: of `control_variates.poisson_terms` for this sampler.
    coordinates: of interest; None for all.
  """

  name: str
  target: Any
  step: Callable
  init: Callable
  rest: tuple
  start: Callable
  reference: Callable
  hooks: dict
  coordinates: tuple[int, ...] | None = None

  @property
  def is_latent(self) -> bool:
    return isinstance(self.target, mcmc.latent_targets.LatentTarget)

  def with_reference(self, mean: Any, preconditioner: Any) -> "Problem":
    """The same with the mean and the preconditioner of a warm-up."""
    return dataclasses.replace(
      self,
      rest=(preconditioner,),
      reference=lambda gamma: mcmc.poisson.Reference(
        gamma, mean, preconditioner
      ),
    )


def with_likelihood(problem: Problem, likelihood_fn: Callable) -> Problem:
  """Logistic regression with another way to compute the likelihood.

  Args:
    problem: of logistic regression.
    likelihood_fn: see `targets.logistic_regression`.
  """
  features, labels = labelled(problem.name)
  target = mcmc.targets.logistic_regression(
    features,
    labels,
    likelihood_fn=likelihood_fn,
    dtype=problem.target.start.dtype,
    name=problem.name,
  )
  return dataclasses.replace(
    problem,
    target=target,
    step=mcmc.bind(_MALA, target.logdensity_fn),
    init=lambda x: mcmc.gi_mala.init(x, target.logdensity_fn),
  )


def make(name: str, dtype: Any = None) -> Problem:
  """A problem.

  Args:
    name: data of `labelled` for logistic regression with a N(0, 1) prior;
      "gaussian:DIM:CONDITION"; "student_t:DEGREES:DIM";
      "gp:DATA:ROWS" for Gaussian process classification of that many rows;
      "cox:SIDE" or "cox_dense:SIDE"; "gp_regression:ROWS".
    dtype: of the computations.
  """
  kind, _, more = name.partition(":")
  if kind == "gp":
    data, _, rows = more.rpartition(":")
    features, labels = labelled(data)
    kept = np.random.default_rng(0).permutation(len(labels))[: int(rows)]
    kept.sort()
    features = features[kept]
    features = features[:, features.std(0) > 0]
    target = mcmc.latent_targets.gp_classification(
      features, labels[kept], dtype=dtype, name=name
    )
    return _latent(name, target)
  if kind == "gp_regression":
    inputs, _ = mcmc.targets.load_labelled("breast_cancer_mean")
    return _latent(
      name,
      mcmc.latent_targets.gp_regression(inputs[: int(more)], dtype=dtype),
    )
  if kind in ("cox", "cox_dense"):
    embedding = "torus" if kind == "cox" else "dense"
    target = mcmc.latent_targets.log_gaussian_cox(
      int(more), embedding=embedding, dtype=dtype
    )
    return _latent(name, target)
  if kind == "gaussian":
    dim, condition = more.split(":")
    rng = np.random.default_rng(0)
    covariance = mcmc.targets.random_covariance(rng, int(dim), float(condition))
    target = mcmc.targets.gaussian(
      rng.standard_normal(int(dim)), covariance, dtype=dtype, name=name
    )
    a = mcmc.preconditioner.eigen(covariance, target.start.dtype)
    return _general(name, target, target.start, a)
  if kind == "student_t":
    degrees, dim = more.split(":")
    target = mcmc.targets.student_t(float(degrees), int(dim), dtype=dtype)
  else:
    features, labels = labelled(name)
    target = mcmc.targets.logistic_regression(
      features, labels, dtype=dtype, name=name
    )
  found = mcmc.laplace.laplace(target.logdensity_fn, target.start)
  if not bool(found.is_converged):
    raise ValueError(
      f"target must have a mode that Newton's method finds; got name={name}."
    )
  a = mcmc.preconditioner.dense(found.covariance)
  return _general(name, target, found.mean, a)


def _general(name, target, mean, a) -> Problem:
  """With GI-MALA, from a guess of the mean and the covariance."""

  def start(rng_key, num_chains):
    shape = (num_chains, target.dim)
    white = jax.random.normal(rng_key, shape, mean.dtype)
    return mean[None] + jax.vmap(a.root)(white)

  return Problem(
    name=name,
    target=target,
    step=mcmc.bind(_MALA, target.logdensity_fn),
    init=lambda x: mcmc.gi_mala.init(x, target.logdensity_fn),
    rest=(a,),
    start=start,
    reference=lambda gamma: mcmc.poisson.Reference(gamma, mean, a),
    hooks={},
  )


def labelled(name: str) -> tuple[np.ndarray, np.ndarray]:
  """Features and 0/1 labels.

  Args:
    name: a data set of `targets.load_labelled`, also a CSV file, or
      "simulated:ROWS:COLUMNS" for standard normal features with labels from
      logistic regression with coefficients N(0, 1 / COLUMNS), seed 0.
  """
  kind, _, more = name.partition(":")
  if kind != "simulated":
    return mcmc.targets.load_labelled(name)
  rows, columns = map(int, more.split(":"))
  return simulated(rows, columns, seed=0)


def simulated(
  rows: int, columns: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Features and labels of "simulated:ROWS:COLUMNS"."""
  rng = np.random.default_rng(seed)
  features = rng.standard_normal((rows, columns))
  truth = rng.standard_normal(columns) / np.sqrt(columns)
  chance = 1 / (1 + np.exp(-features @ truth))
  return features, (rng.random(rows) < chance).astype(np.int64)


def _latent(name, target) -> Problem:
  sampler = mcmc.gi_latent_gaussian
  kernel = sampler.build_kernel(target.curvature_fn)
  dtype = target.covariance.values.dtype
  zero = jnp.zeros((target.dim,), dtype)
  centre = sampler.init(
    zero, target.likelihood_fn, target.covariance, target.curvature_fn
  )

  def start(rng_key, num_chains):
    white = jax.random.normal(rng_key, (num_chains, target.dim), dtype)
    return 0.1 * jax.vmap(target.from_white)(white)

  # Any fixed reference is valid; the curvature at the prior mean is near enough
  # for the score, and linear functions do not see the reference's mean.
  def reference(gamma):
    return sampler.reference(gamma, zero, target.covariance, centre.curvature)

  observed = target.observed
  return Problem(
    name=name,
    target=target,
    step=mcmc.bind(kernel, target.likelihood_fn),
    init=lambda x: sampler.init(
      x, target.likelihood_fn, target.covariance, target.curvature_fn
    ),
    rest=(target.covariance,),
    start=start,
    reference=reference,
    hooks=dict(
      covariance_fn=sampler.proposal_covariance,
      precond_grad_fn=sampler.reference_precond_grad,
    ),
    coordinates=None if observed is None else tuple(observed.tolist()),
  )
