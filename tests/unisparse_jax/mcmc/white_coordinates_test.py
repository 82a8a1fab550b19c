# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import (
  base,
  control_variates,
  gi_mala,
  poisson,
  preconditioner,
  targets,
  white_coordinates,
)


def problems():
  rng = np.random.default_rng(0)
  covariance = targets.random_covariance(rng, 3, 1e3)
  yield targets.gaussian(np.arange(3.0), covariance)
  features = rng.standard_normal((30, 2)) * 4 + 1
  yield targets.logistic_regression(features, np.arange(30) % 2)


def guess():
  rng = np.random.default_rng(1)
  return rng.standard_normal(3), targets.random_covariance(rng, 3, 50.0)


def test_the_density_is_that_of_x(x64):
  mean, covariance = guess()
  for target in problems():
    white = white_coordinates.whitened(target, mean, covariance)
    z = jax.random.normal(jax.random.key(0), (5, 3))
    x = jax.vmap(white.coordinates.position)(z)
    here = jax.vmap(white.logdensity_fn)(z)
    there = jax.vmap(target.logdensity_fn)(x)
    np.testing.assert_allclose(here, there, rtol=1e-12)
    assert np.std(here) > 0.1
    root = np.asarray(white.coordinates.matrix)
    np.testing.assert_allclose(root @ root.T, covariance, rtol=1e-10)
    np.testing.assert_allclose(
      white.coordinates.diagonal(), np.diag(covariance), rtol=1e-10
    )
    if target.sample is not None:
      key = jax.random.key(1)
      back = jax.vmap(white.coordinates.position)(white.sample(key, 4))
      np.testing.assert_allclose(back, target.sample(key, 4), rtol=1e-10)


def test_terms_are_those_of_the_chain_of_x(x64):
  # The same noise gives the same chain, in x and in z.
  mean, covariance = guess()
  covariance *= 0.1
  *_, target = problems()
  white = white_coordinates.whitened(target, mean, covariance)
  gamma = jnp.float64(0.4)
  reference = poisson.Reference(gamma, jnp.asarray(mean), white.preconditioner)
  functions = (
    poisson.Linear(),
    poisson.Square(),
    poisson.indicator(3, (1,), (0.2,), num_terms=1),
  )
  start = 0.3 * jax.random.normal(jax.random.key(1), (2, 3))

  def run(logdensity_fn, start, a, coordinates):
    variates = control_variates.poisson_terms(
      functions, coordinates=coordinates
    )
    return base.run_chains(
      jax.random.key(2),
      base.bind(gi_mala.build_kernel(), logdensity_fn),
      jax.jit(jax.vmap(lambda x: gi_mala.init(x, logdensity_fn)))(start),
      60,
      parameters=(gamma, a),
      collector=variates.collector,
      carry=variates.init(start),
      collector_parameters=(reference,),
      batch_size=20,
    )

  in_z = run(
    white.logdensity_fn, start, preconditioner.identity(3), white.coordinates
  )
  in_x = run(
    target.logdensity_fn,
    jax.vmap(white.coordinates.position)(start),
    white.preconditioner,
    None,
  )
  np.testing.assert_allclose(
    in_z.carry.steps.mean, in_x.carry.steps.mean, rtol=1e-8, atol=1e-10
  )
  np.testing.assert_allclose(in_z.carry.centre, in_x.carry.centre, rtol=1e-8)
  assert 0 < int(in_z.stats.num_accepted.sum()) < 120


def test_bad_arguments_are_named():
  mean, covariance = guess()
  with pytest.raises(ValueError, match=r"target must give its log-density in"):
    white_coordinates.whitened(targets.student_t(5.0, 3), mean, covariance)
  target = next(problems())
  with pytest.raises(ValueError, match=r"covariance must have shape"):
    white_coordinates.whitened(target, mean, np.eye(2))
  with pytest.raises(ValueError, match=r"covariance must be positive definite"):
    white_coordinates.whitened(target, mean, -np.eye(3))
