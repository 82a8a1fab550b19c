# SPDX-License-Identifier: Apache-2.0
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import (
  base,
  control_variates,
  covariances,
  estimates,
  gi_latent_gaussian,
  latent_targets,
  poisson,
  targets,
)


def test_gp_classification(x64):
  features, labels = targets.load_labelled("diabetes")
  target = latent_targets.gp_classification(features[:8], labels[:8])
  x = jnp.linspace(-1, 1, 8)
  prior = -0.5 * x @ np.linalg.solve(target.matrix, np.asarray(x))
  sign = 2.0 * labels[:8] - 1
  fit = -np.log1p(np.exp(-sign * np.asarray(x))).sum()
  np.testing.assert_allclose(target.logdensity_fn(x), fit + prior, rtol=1e-6)
  white = jax.random.normal(jax.random.key(0), (8,))
  np.testing.assert_allclose(
    target.white_logdensity_fn(white),
    target.logdensity_fn(target.from_white(white)),
    rtol=1e-6,
  )
  distance = np.sum((features[0] - features[1]) ** 2 / features[:8].var(0))
  np.testing.assert_allclose(
    target.matrix[0, 1], 2 * np.exp(-distance / 2 / 10), rtol=1e-10
  )


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (3, 1), (1, 6), (6, 6)])
def test_hartley_is_cos_plus_sin(shape, x64):
  torus = covariances.circulant(*shape, lambda i, j: np.exp(-i - j))
  vector = jax.random.normal(jax.random.key(0), (math.prod(shape),))
  full = np.fft.fft2(np.asarray(vector).reshape(shape))
  expected = (full.real - full.imag).ravel() / math.sqrt(vector.size)
  found = torus.to_eigen(vector)
  np.testing.assert_allclose(found, expected, atol=1e-13)
  np.testing.assert_allclose(torus.from_eigen(found), vector, atol=1e-13)


def test_the_torus_holds_the_grid(x64):
  torus = latent_targets.log_gaussian_cox(4)
  grid = latent_targets.log_gaussian_cox(4, embedding="dense")
  assert torus.dim == 64 and grid.dim == 16
  np.testing.assert_array_equal(torus.data, grid.data)
  units = jnp.eye(64)[torus.observed]
  rows = jax.vmap(
    lambda e: torus.covariance.from_eigen(
      torus.covariance.values * torus.covariance.to_eigen(e)
    )
  )(units)
  np.testing.assert_allclose(
    rows[:, torus.observed], grid.matrix, rtol=1e-6, atol=1e-9
  )
  x = jax.random.normal(jax.random.key(0), (64,))
  np.testing.assert_allclose(
    torus.likelihood_fn(x), grid.likelihood_fn(x[torus.observed])
  )
  # Counts are not all alike, and their law has the constants of the benchmark.
  many = latent_targets.log_gaussian_cox(32, seed=3)
  assert 40 < many.data.sum() < 400


def test_torus_and_grid_agree_on_the_posterior(x64):
  found = []
  for embedding in ("torus", "dense"):
    target = latent_targets.log_gaussian_cox(4, embedding=embedding)
    kernel = gi_latent_gaussian.build_kernel(target.curvature_fn)
    step = base.bind(kernel, target.likelihood_fn)
    start = jnp.zeros((32, target.dim))
    state = jax.vmap(
      lambda x, t=target: gi_latent_gaussian.init(
        x, t.likelihood_fn, t.covariance, t.curvature_fn
      )
    )(start)
    gamma = jnp.float64(0.2)  # accepts about 0.8
    coordinates = (
      None if target.observed is None else tuple(target.observed.tolist())
    )
    variates = control_variates.poisson_terms(
      poisson.Linear(coordinates),
      covariance_fn=gi_latent_gaussian.proposal_covariance,
      precond_grad_fn=gi_latent_gaussian.reference_precond_grad,
    )
    reference = gi_latent_gaussian.reference(
      gamma, jnp.zeros(target.dim), target.covariance, jnp.float64(0.5)
    )

    # One program for both: what the first collects is dropped.
    go = functools.partial(
      base.run_chains,
      step=step,
      parameters=(gamma, target.covariance),
      collector=variates.collector,
      carry=variates.init(start),
      collector_parameters=(reference,),
      batch_size=50,
    )
    burned = go(jax.random.key(0), state=state, num_steps=200)
    run = go(burned.rng_keys, state=burned.state, num_steps=1000)
    assert 0.7 < float(run.stats.acceptance_rate.mean()) < 0.95
    choice = estimates.choose(run.carry, control_variates.candidates(3))
    assert np.median(choice.estimate.factor) > 3
    assert np.all(choice.estimate.factor > 0.9)
    found.append(choice.estimate)
  gap = np.abs(found[0].mean - found[1].mean)
  assert np.max(gap / np.hypot(found[0].mcse, found[1].mcse)) < 4


def test_gp_regression_is_gaussian(x64):
  inputs = np.random.default_rng(0).standard_normal((10, 3))
  target = latent_targets.gp_regression(inputs, noise=0.1)
  algorithm = gi_latent_gaussian.as_top_level_api(
    target.likelihood_fn, 0.9, target.covariance
  )
  start = jax.vmap(algorithm.init)(jnp.zeros((4, 10)))
  run = base.run_chains(jax.random.key(0), algorithm.step, start, 100)
  assert np.all(run.stats.num_accepted == 100)
  assert np.max(run.stats.max_abs_log_ratio) < 1e-8


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match=r"embedding must be a known name"):
    latent_targets.log_gaussian_cox(4, embedding="sphere")
  with pytest.raises(ValueError, match=r"labels must be 0 and 1"):
    latent_targets.gp_classification(np.eye(3), np.array([0, 1, 2]))


def test_memory_of_a_cox_process_is_linear_in_its_size(x64):
  kernel = gi_latent_gaussian.build_kernel
  for side in (16, 64):
    target = latent_targets.log_gaussian_cox(side)
    step = base.bind(kernel(target.curvature_fn), target.likelihood_fn)

    def go(key, x, prior, step=step, target=target):
      state = gi_latent_gaussian.init(
        x, target.likelihood_fn, prior, target.curvature_fn
      )
      return step(key, state, jnp.float64(0.1), prior)[0].position

    compiled = (
      jax.jit(go)
      .lower(jax.random.key(0), jnp.zeros(target.dim), target.covariance)
      .compile()
    )
    found = compiled.memory_analysis()
    size = found.temp_size_in_bytes + found.argument_size_in_bytes
    # Measured: 8.4 and 11.0 vectors; one matrix would be 1,024 and 16,384.
    assert 2 < size / (8 * target.dim) < 24
