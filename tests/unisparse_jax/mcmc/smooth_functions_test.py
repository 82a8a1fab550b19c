# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import (
  base,
  control_variates,
  estimates,
  gi_mala,
  poisson,
  preconditioner,
  smooth_functions,
  targets,
)


def cubic(mean, covariance):
  """x_0^2 x_1 and exp(x_2) for x of three coordinates."""
  (variance,) = covariance.entries(jnp.array([0]), jnp.array([0]))
  (both,) = covariance.entries(jnp.array([0]), jnp.array([1]))
  square = mean[0] ** 2 + variance
  other = jnp.exp(mean[2] + 0.5 * covariance.diagonal()[2])
  return jnp.stack([square * mean[1] + 2 * mean[0] * both, other])


def test_nothing_is_left_on_a_gaussian(x64):
  rng = np.random.default_rng(0)
  mean = rng.standard_normal(3)
  covariance = targets.random_covariance(rng, 3, 10.0)
  target = targets.gaussian(mean, covariance)
  a = preconditioner.eigen(covariance)
  gamma = jnp.float64(0.9)
  family = smooth_functions.Smooth(cubic, num_terms=6)
  x = jnp.array([0.3, -1.2, 0.5])
  np.testing.assert_allclose(
    family.value(x), [0.09 * -1.2, np.exp(0.5)], rtol=1e-14
  )
  terms = control_variates.poisson_terms(family)
  start = target.sample(jax.random.key(0), 8)
  run = base.run_chains(
    jax.random.key(1),
    base.bind(gi_mala.build_kernel(), target.logdensity_fn),
    jax.jit(jax.vmap(lambda x: gi_mala.init(x, target.logdensity_fn)))(start),
    200,
    parameters=(gamma, a),
    collector=terms.collector,
    carry=terms.init(start),
    collector_parameters=(poisson.Reference(gamma, jnp.asarray(mean), a),),
    batch_size=20,
  )
  fixed = control_variates.TWO_TERMS
  found = estimates.estimate(run.carry, fixed.cv_coef, terms=fixed.terms)
  sd = np.sqrt(found.variance)
  # 0.1^6 of the series is cut off. Measured: 4.8e-9.
  assert np.max(found.chain_means.std(0) / sd) < 2e-8
  assert np.min(found.plain_chain_means.std(0) / sd) > 1e-2
  s, m = covariance, mean
  exact = (m[0] ** 2 + s[0, 0]) * m[1] + 2 * m[0] * s[0, 1]
  # The series drops pi(F) of every term from G, and so from none of the means.
  assert abs(found.mean[0] - exact) < 2e-8 * sd[0]
  # `choose` is not led astray by a score that is 0.
  choice = estimates.choose(run.carry, control_variates.candidates(3))
  assert set(choice.chosen) <= {"two_fixed", "two", "all"}


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match=r"smooth must be a function"):
    smooth_functions.Smooth(None)  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match=r"num_terms must be >= 0"):
    smooth_functions.Smooth(cubic, num_terms=-1)
