# SPDX-License-Identifier: Apache-2.0
"""On a Gaussian every proposal is accepted and no variance is left."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import (
  base,
  chain_data,
  control_variates,
  covariances,
  estimates,
  gi_hessian_mala,
  gi_latent_gaussian,
  gi_mala,
  gi_rwm,
  poisson,
  preconditioner,
  targets,
  white_coordinates,
)

GAMMAS = (0.5, 1.0, 1.6)
NUM_TERMS = 60  # 0.6^60 = 5e-14


def functions(dim, mean, covariance):
  """Linear, quadratic, product, exponential and tail functions.

  The last two, whose series compile slowly, in 4 dimensions only.
  """
  rng = np.random.default_rng(0)
  spread = np.sqrt(np.diag(covariance))
  directions = rng.standard_normal((2, dim)) / spread / np.sqrt(dim)
  bounds = mean[:2] + np.array([0.5, -1.0]) * spread[:2]
  polynomials = (
    poisson.Linear(),
    poisson.Square(),
    poisson.Product(((0, 1), (dim - 1, 0))),
  )
  if dim != 4:
    return polynomials
  return (
    *polynomials,
    poisson.exponential(directions, num_terms=NUM_TERMS),
    poisson.indicator(dim, (0, 1), bounds, num_terms=NUM_TERMS),
  )


def relative_sd(carry):
  """Spread of the two-term estimator over chains, by the target's spread."""
  fixed = control_variates.TWO_TERMS
  result = estimates.estimate(carry, fixed.cv_coef, terms=fixed.terms)
  sd = np.sqrt(result.variance)
  plain = result.plain_chain_means.std(0) / sd
  assert np.all(plain > 1e-3)  # there was something to remove
  return result.chain_means.std(0) / sd


def run(sampler, target, covariance, gamma, dtype, coordinates=()):
  """200 steps of 8 chains from exact draws: (max |log ratio|, relative sd)."""
  mean = jnp.asarray(target.mean, dtype)
  a = preconditioner.eigen(covariance, dtype)
  start = target.sample(jax.random.key(1), 8)
  score = sampler is not gi_rwm
  terms = _terms(sampler, target.dim, score)
  gamma = jnp.asarray(gamma, dtype)
  more = {gi_mala: (a,), gi_rwm: (mean, a), gi_hessian_mala: coordinates}[
    sampler
  ]

  def init(x):
    return sampler.init(x, target.logdensity_fn, *coordinates)

  result = base.run_chains(
    jax.random.key(2),
    base.bind(_KERNELS[sampler], target.logdensity_fn),
    jax.jit(jax.vmap(init))(start),
    200,
    parameters=(gamma, *more),
    collector=terms.collector,
    carry=terms.init(start),
    collector_parameters=(poisson.Reference(gamma, mean, a),),
    batch_size=20,
  )
  return float(result.stats.max_abs_log_ratio.max()), relative_sd(result.carry)


_KERNELS = {m: m.build_kernel() for m in (gi_mala, gi_rwm, gi_hessian_mala)}
_CACHE = {}


def _terms(sampler, dim, score):
  mean, covariance = _problem(dim)
  key = (sampler, dim)
  if key not in _CACHE:
    hooks = {}
    if sampler is gi_hessian_mala:
      hooks = dict(
        covariance_fn=gi_hessian_mala.proposal_covariance,
        precond_grad_fn=gi_hessian_mala.reference_precond_grad,
      )
    _CACHE[key] = control_variates.poisson_terms(
      functions(dim, mean, covariance), score=score, **hooks
    )
  return _CACHE[key]


@functools.cache
def _target(dim):
  """In float64; one object, so that what is compiled for it is kept."""
  return targets.gaussian(*_problem(dim))


def _problem(dim, condition=100.0):
  rng = np.random.default_rng(dim)
  return rng.standard_normal(dim), targets.random_covariance(
    rng, dim, condition
  )


@pytest.mark.parametrize("sampler", [gi_mala, gi_rwm, gi_hessian_mala])
def test_nothing_is_left(sampler, x64):
  _, covariance = _problem(4)
  target = _target(4)
  for gamma in GAMMAS:
    ratio, sd = run(sampler, target, covariance, gamma, jnp.float64)
    # Measured: 6e-14 and 3e-14 at most.
    assert ratio < 1e-11
    assert np.max(sd) < 1e-12
  if sampler is gi_mala:
    # The noise of the usual Langevin proposal, 2 step_size A, is another A.
    wrong = 2 / (2 - GAMMAS[0])
    ratio, sd = run(sampler, target, wrong * covariance, GAMMAS[0], jnp.float64)
    assert ratio > 0.1
    assert np.min(sd[:4]) > 1e-3


@pytest.mark.parametrize(
  ("sampler", "dim"), [(gi_mala, 100), (gi_rwm, 100), (gi_hessian_mala, 12)]
)
def test_ill_conditioned(sampler, dim, x64):
  # At step_size 1.6, the worst. Measured in 100 dimensions, all functions:
  # ratios of 7.6e-12, 1.5e-12 and 5.8e-12, spreads of 2.4e-13, 6e-14, 1.5e-13.
  mean, covariance = _problem(dim, 1e6)
  target = targets.gaussian(mean, covariance)
  coordinates = ()
  if sampler is gi_hessian_mala:
    coordinates = (preconditioner.eigen(covariance),)
  ratio, sd = run(sampler, target, covariance, 1.6, jnp.float64, coordinates)
  assert ratio < 1e-11
  assert np.max(sd) < 1e-11


def test_float32():
  # Measured in 100 dimensions, condition 100 and 1e6, step_size 1.6: gi_mala
  # 6.5e-5 and 2e-3 (its gradient has no more digits, see there), gi_rwm 2e-5
  # and 2e-5, spreads of 2e-6 and 6e-5.
  mean, covariance = _problem(5, 1e3)
  target = targets.gaussian(mean, covariance, dtype=jnp.float32)
  ratio, sd = run(gi_mala, target, covariance, 1.6, jnp.float32)
  assert ratio < 1e-4
  assert np.max(sd) < 1e-4


@pytest.mark.parametrize(
  ("sampler", "dim"), [(gi_mala, 100), (gi_rwm, 100), (gi_hessian_mala, 12)]
)
def test_float32_in_white_coordinates(sampler, dim):
  # Condition 1e6. Measured in 100 dimensions: ratios of 1.5e-5, 0 and 1.6e-5,
  # spreads of 7e-7 at most; in x, gi_mala's ratio is 2e-3.
  mean, covariance = _problem(dim, 1e6)
  target = white_coordinates.whitened(
    targets.gaussian(mean, covariance, dtype=jnp.float32), mean, covariance
  )
  start = target.sample(jax.random.key(1), 8)
  gamma, one = jnp.float32(1.6), preconditioner.identity(dim, jnp.float32)
  more = {gi_mala: (one,), gi_rwm: (target.start, one), gi_hessian_mala: ()}
  hooks = {}
  if sampler is gi_hessian_mala:
    hooks = dict(
      covariance_fn=gi_hessian_mala.proposal_covariance,
      precond_grad_fn=gi_hessian_mala.reference_precond_grad,
    )
  terms = control_variates.poisson_terms(
    functions(dim, mean, covariance),
    score=sampler is not gi_rwm,
    coordinates=target.coordinates,
    **hooks,
  )
  reference = poisson.Reference(
    gamma, jnp.asarray(mean, jnp.float32), target.preconditioner
  )
  result = base.run_chains(
    jax.random.key(2),
    base.bind(_KERNELS[sampler], target.logdensity_fn),
    jax.jit(jax.vmap(lambda z: sampler.init(z, target.logdensity_fn)))(start),
    200,
    parameters=(gamma, *more[sampler]),
    collector=terms.collector,
    carry=terms.init(start),
    collector_parameters=(reference,),
    batch_size=20,
  )
  assert float(result.stats.max_abs_log_ratio.max()) < 1e-4
  assert np.max(relative_sd(result.carry)) < 1e-4
  # They are means of x and x^2.
  fixed = control_variates.TWO_TERMS
  found = estimates.estimate(result.carry, fixed.cv_coef, terms=fixed.terms)
  exact = np.concatenate([mean, mean**2 + np.diag(covariance)])
  gap = (found.mean[: 2 * dim] - exact) / np.sqrt(found.variance[: 2 * dim])
  assert np.max(np.abs(gap)) < 1e-4


def test_score_alone_is_exact(x64):
  mean, covariance = _problem(4)
  target = _target(4)
  a = preconditioner.eigen(covariance)
  start = target.sample(jax.random.key(1), 8)
  terms = _terms(gi_mala, 4, True)
  gamma = jnp.float64(0.5)
  result = base.run_chains(
    jax.random.key(2),
    base.bind(_KERNELS[gi_mala], target.logdensity_fn),
    jax.jit(jax.vmap(lambda x: gi_mala.init(x, target.logdensity_fn)))(start),
    200,
    parameters=(gamma, a),
    collector=terms.collector,
    carry=terms.init(start, products_of_terms=True),
    collector_parameters=(poisson.Reference(gamma, jnp.asarray(mean), a),),
    batch_size=20,
  )
  alone = estimates.estimate(
    result.carry, (1.0,), terms=(control_variates.SCORE,)
  )
  sd = alone.chain_means.std(0) / np.sqrt(alone.variance)
  assert np.max(sd[:10]) < 1e-12  # linear, square and product
  assert np.min(sd[10:]) > 1e-4  # no closed form for the others
  # Least squares with all terms finds the exact coefficients too.
  fitted = estimates.estimate(result.carry, estimates.LEAST_SQUARES)
  sd = fitted.chain_means.std(0) / np.sqrt(fitted.variance)
  assert np.max(sd) < 1e-9


def test_polynomials_are_exact(x64):
  mean, covariance = _problem(3)
  target = targets.gaussian(mean, covariance)
  a = preconditioner.dense(np.eye(3) * 0.2)  # any will do: rejections too
  variates = control_variates.polynomial_terms(
    (poisson.Linear(), poisson.Square(), poisson.Product(((0, 2),))),
    3,
    order=2,
  )
  start = target.sample(jax.random.key(1), 4)
  gamma = jnp.float64(0.5)
  result = base.run_chains(
    jax.random.key(2),
    base.bind(_KERNELS[gi_mala], target.logdensity_fn),
    jax.jit(jax.vmap(lambda x: gi_mala.init(x, target.logdensity_fn)))(start),
    400,
    parameters=(gamma, a),
    collector=variates.collector,
    carry=variates.init(start),
    collector_parameters=(poisson.Reference(gamma, jnp.zeros(3), a),),
    batch_size=10,
  )
  joint = chain_data.split_shared(jax.device_get(result.carry), 7)
  found = estimates.estimate(joint)
  exact = [*mean, *(mean**2 + np.diag(covariance))]
  exact.append(mean[0] * mean[2] + covariance[0, 2])
  np.testing.assert_allclose(found.mean, exact, atol=1e-9)
  assert np.min(np.abs(found.plain_mean - exact)) > 1e-4
  assert float(result.stats.acceptance_rate.mean()) < 0.99


def test_latent_gaussian_with_a_gaussian_likelihood(x64):
  rng = np.random.default_rng(5)
  dim, noise = 6, 0.3
  prior = covariances.dense(targets.random_covariance(rng, dim, 1e6))
  data = jnp.asarray(rng.standard_normal(dim))

  def likelihood(x):
    return -0.5 * jnp.sum((x - data) ** 2) / noise

  exact = covariances.InverseShifted(prior, jnp.float64(1 / noise))
  mean = exact.apply(data / noise)
  reference = gi_latent_gaussian.reference(
    jnp.float64(0.7), mean, prior, jnp.float64(1 / noise)
  )
  terms = control_variates.poisson_terms(
    (poisson.Linear(), poisson.Square(), poisson.Product(((0, 1), (2, 2)))),
    covariance_fn=gi_latent_gaussian.proposal_covariance,
    precond_grad_fn=gi_latent_gaussian.reference_precond_grad,
  )
  start = jax.vmap(lambda z: mean + exact.root(z))(
    jax.random.normal(jax.random.key(0), (8, dim))
  )
  result = base.run_chains(
    jax.random.key(1),
    base.bind(gi_latent_gaussian.build_kernel(), likelihood),
    jax.jit(jax.vmap(lambda x: gi_latent_gaussian.init(x, likelihood, prior)))(
      start
    ),
    200,
    parameters=(jnp.float64(0.7), prior),
    collector=terms.collector,
    carry=terms.init(start),
    collector_parameters=(reference,),
    batch_size=20,
  )
  assert float(result.stats.max_abs_log_ratio.max()) < 1e-11
  assert np.max(relative_sd(result.carry)) < 1e-12
  score = estimates.estimate(
    result.carry, (1.0,), terms=(control_variates.SCORE,)
  )
  assert np.max(score.chain_means.std(0)) < 1e-12
