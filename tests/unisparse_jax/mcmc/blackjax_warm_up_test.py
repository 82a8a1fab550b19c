# SPDX-License-Identifier: Apache-2.0
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import base, blackjax_warm_up, gi_mala, targets

COVARIANCE = targets.random_covariance(np.random.default_rng(0), 3, 30.0)


@pytest.mark.parametrize("diagonal", [True, False])
def test_window_adaptation(diagonal, x64):
  gaussian = targets.gaussian(np.arange(3.0), COVARIANCE)

  def logdensity_fn(x):
    return gaussian.logdensity_fn(x) - 0.05 * jnp.sum((x - 1) ** 4)

  warm_up = blackjax.window_adaptation(
    blackjax_warm_up.GIMALA,
    logdensity_fn,
    is_mass_matrix_diagonal=diagonal,
    target_acceptance_rate=0.775,
  )
  # BlackJAX's own code promotes types.
  with jax.numpy_dtype_promotion("standard"):
    (state, found), _ = warm_up.run(jax.random.key(0), gaussian.start, 600)
  step_size, a = blackjax_warm_up.parameters(**found)
  assert 0 < float(step_size) < 2
  sampler = gi_mala.as_top_level_api(logdensity_fn, step_size, a)
  run = base.run_chains(
    jax.random.key(1),
    sampler.step,
    jax.tree.map(lambda x: x[None], state),
    2000,
  )
  # One chain of 600 steps tunes no better: 0.86 and 0.73 measured.
  assert 0.55 < float(run.stats.acceptance_rate[0]) < 0.95


@pytest.mark.parametrize("scale", [1e-3, 1.0, 9.0])
def test_any_positive_step_size_has_its_own(scale, x64):
  found, a = blackjax_warm_up.parameters(scale, jnp.asarray(COVARIANCE))
  np.testing.assert_allclose(found / (2 - found), scale)
  np.testing.assert_allclose(a.apply(jnp.ones(3)), COVARIANCE.sum(1))
  np.testing.assert_allclose(a.factor @ a.factor.T, COVARIANCE)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match=r"inverse_mass_matrix must be a vector"):
    blackjax_warm_up.parameters(1.0, jnp.ones(()))
