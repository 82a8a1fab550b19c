# SPDX-License-Identifier: Apache-2.0
"""One sampler on Gaussians of several condition numbers."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks
from unisparse_jax import mcmc

SAMPLERS = ("gi_rwm", "gi_mala", "gi_hessian_mala", "gi_latent_gaussian")
_NUM_TERMS = 60  # of the series: 0.6^60 = 5e-14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One sampler in one number format.

  Attributes:
    sampler: one of SAMPLERS.
    dim: coordinates.
    dtype: "float64" or "float32".
    coordinates: "x", or "white" for `white_coordinates`.
    conditions: condition numbers; of the prior for gi_latent_gaussian, whose
      likelihood is Gaussian.
    step_sizes: of the kernel.
    num_chains: from exact draws.
    num_steps: of each.
  """

  sampler: str
  dim: int
  dtype: str = "float64"
  coordinates: str = "x"
  conditions: tuple[float, ...] = (1.0, 1e3, 1e6)
  step_sizes: tuple[float, ...] = (0.5, 1.0, 1.6)
  num_chains: int = 8
  num_steps: int = 200

  def __post_init__(self):
    for name, allowed in (
      ("sampler", SAMPLERS),
      ("dtype", ("float64", "float32")),
      ("coordinates", ("x", "white")),
    ):
      checks.check_choice(name, getattr(self, name), allowed)
    checks.require(
      self.dim >= 2, "dim", "be >= 2, for products of two coordinates", self.dim
    )
    checks.require(
      (self.sampler, self.coordinates) != ("gi_latent_gaussian", "white"),
      "coordinates",
      "be 'x' for gi_latent_gaussian, which has its own",
      self.coordinates,
    )


class _Problem(NamedTuple):
  kernel: Any
  density: Callable
  init: Callable
  start: Any
  rest: tuple
  reference: Callable  # step_size -> poisson.Reference
  hooks: dict
  mean: Any
  spread: Any


def measure(row: Row, seed: int) -> Iterator[dict]:
  """Yields a measurement for each condition number and step size."""
  dtype = jnp.dtype(row.dtype)
  for condition in row.conditions:
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(row.dim)
    covariance = mcmc.targets.random_covariance(rng, row.dim, condition)
    latent = row.sampler == "gi_latent_gaussian"
    build = _latent if latent else _general
    problem = build(row, mean, covariance, dtype)
    functions = _functions(problem.mean, problem.spread)
    terms = mcmc.control_variates.poisson_terms(
      functions, score=row.sampler != "gi_rwm", **problem.hooks
    )
    step = mcmc.bind(problem.kernel, problem.density)
    state = jax.jit(jax.vmap(problem.init))(problem.start)
    for step_size in row.step_sizes:
      gamma = jnp.asarray(step_size, dtype)
      run = mcmc.run_chains(
        jax.random.key(seed + 2),
        step,
        state,
        row.num_steps,
        parameters=(gamma, *problem.rest),
        collector=terms.collector,
        carry=terms.init(problem.start),
        collector_parameters=(problem.reference(gamma),),
        batch_size=row.num_steps // 10,
      )
      yield {
        "condition": condition,
        "step_size": step_size,
        "max_abs_log_ratio": float(np.max(run.stats.max_abs_log_ratio)),
        **_spread(run.carry),
      }


def _spread(carry) -> dict:
  fixed = mcmc.control_variates.TWO_TERMS
  found = mcmc.estimate(carry, fixed.cv_coef, terms=fixed.terms)
  sd = np.sqrt(found.variance)
  relative = found.chain_means.std(0) / sd
  return {
    "max_relative_sd": float(relative.max()),
    "min_plain_relative_sd": float((found.plain_chain_means.std(0) / sd).min()),
  }


def _functions(mean, spread):
  """Linear, square, product, exponential and tail functions."""
  rng, dim = np.random.default_rng(0), len(mean)
  directions = rng.standard_normal((2, dim)) / spread / np.sqrt(dim)
  bounds = mean[:2] + np.array([0.5, -1.0]) * spread[:2]
  return (
    mcmc.poisson.Linear(),
    mcmc.poisson.Square(),
    mcmc.poisson.Product(((0, 1), (dim - 1, 0))),
    mcmc.poisson.exponential(directions, num_terms=_NUM_TERMS),
    mcmc.poisson.indicator(dim, (0, 1), bounds, num_terms=_NUM_TERMS),
  )


def _general(row, mean, covariance, dtype):
  target = mcmc.targets.gaussian(mean, covariance, dtype=dtype)
  sampler = getattr(mcmc, row.sampler)
  a = mcmc.preconditioner.eigen(covariance, dtype)
  hooks: dict[str, Any] = {}
  centre, inner, coordinates = target.start, a, ()
  if row.sampler == "gi_hessian_mala":
    hooks = dict(
      covariance_fn=sampler.proposal_covariance,
      precond_grad_fn=sampler.reference_precond_grad,
    )
    coordinates = (a,)
  if row.coordinates == "white":
    target = mcmc.white_coordinates.whitened(target, mean, covariance)
    hooks["coordinates"] = target.coordinates
    centre = target.start
    inner = mcmc.preconditioner.identity(row.dim, dtype)
    coordinates = ()
  rest = {
    "gi_rwm": (centre, inner),
    "gi_mala": (inner,),
    "gi_hessian_mala": coordinates,
  }[row.sampler]
  mean_ = jnp.asarray(mean, dtype)
  assert target.sample is not None  # A Gaussian has exact draws.
  return _Problem(
    sampler.build_kernel(),
    target.logdensity_fn,
    lambda x: sampler.init(x, target.logdensity_fn, *coordinates),
    target.sample(jax.random.key(1), row.num_chains),
    rest,
    lambda gamma: mcmc.poisson.Reference(gamma, mean_, a),
    hooks,
    mean,
    np.sqrt(np.diag(covariance)),
  )


def _latent(row, data, matrix, dtype):
  sampler, noise = mcmc.gi_latent_gaussian, 0.3
  prior = mcmc.covariances.dense(matrix, dtype=dtype)
  seen = jnp.asarray(data, dtype)

  def likelihood_fn(x):
    return -0.5 * jnp.sum((x - seen) ** 2) / noise

  curvature = jnp.asarray(1 / noise, dtype)
  exact = mcmc.covariances.InverseShifted(prior, curvature)
  mean = exact.apply(seen / noise)
  white = jax.random.normal(jax.random.key(1), (row.num_chains, row.dim), dtype)
  return _Problem(
    sampler.build_kernel(),
    likelihood_fn,
    lambda x: sampler.init(x, likelihood_fn, prior),
    mean[None] + jax.vmap(exact.root)(white),
    (prior,),
    lambda gamma: sampler.reference(gamma, mean, prior, curvature),
    dict(
      covariance_fn=sampler.proposal_covariance,
      precond_grad_fn=sampler.reference_precond_grad,
    ),
    np.asarray(mean, np.float64),
    np.sqrt(np.asarray(exact.diagonal(), np.float64)),
  )
