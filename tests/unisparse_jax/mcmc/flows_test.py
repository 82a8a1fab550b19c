# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import (
  adaptive_independent_metropolis,
  estimates,
  expectations,
  flow_fits,
  flows,
  independent_blocks,
  proposal_fits,
  proposals,
)


def start(dim=2):
  covariance = np.eye(dim) + 0.4
  return proposals.gaussian(np.arange(dim) / 2.0, covariance)


def bent(dim=2, size=0.5, **options):
  """A flow with random parameters."""
  options = {"num_layers": 3, "hidden": 5} | options
  flow = flows.coupling(jax.random.key(0), start(dim), **options)
  rng = np.random.default_rng(1)

  def noisy(x):
    return x + size * rng.standard_normal(x.shape)

  layers = jax.tree.map(noisy, flow.layers)
  layers = layers._replace(kept=flow.layers.kept)
  return dataclasses.replace(flow, layers=layers)


def banana(x):
  """x0 ~ N(0, 1) and x1 ~ N(x0^2 / 2, 1 / 4): E x1 = 0.5."""
  bent = x[1] - 0.5 * jnp.square(x[0])
  return -0.5 * jnp.square(x[0]) - 2 * jnp.square(bent)


def test_pull_undoes_push_and_knows_the_jacobian(x64):
  flow = bent(3)
  push, pull = jax.jit(flow.push), jax.jit(flow.pull)
  jacobian = jax.jit(jax.jacobian(lambda z: flow.push(z)[0]))
  for z in np.random.default_rng(2).standard_normal((5, 3)) * 2:
    x, log_det = push(z)
    back, log_det_back = pull(x)
    np.testing.assert_allclose(back, z, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_det_back, log_det, rtol=1e-9, atol=1e-9)
    exact = np.linalg.slogdet(jacobian(z))[1]
    np.testing.assert_allclose(log_det, exact, rtol=1e-9, atol=1e-9)
    assert np.max(np.abs(x - flow.mean - flow.root @ z)) > 0.1  # it bends
  # Far out too, where the heavy part of a base draws.
  far = jnp.array([200.0, -500.0, 80.0])
  x, _ = push(far)
  assert np.all(np.isfinite(x))
  np.testing.assert_allclose(pull(x)[0], far, rtol=1e-6)


def test_the_density_is_normalised(x64):
  flow = bent(2, 0.3)
  grid = jnp.linspace(-20.0, 20.0, 701)
  points = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
  level = jax.jit(jax.vmap(flow.logdensity))(points)
  total = float(jnp.sum(jnp.exp(level))) * float(grid[1] - grid[0]) ** 2
  np.testing.assert_allclose(total, 1, rtol=2e-3)


def test_it_begins_as_its_start(x64):
  flow = flows.coupling(jax.random.key(0), start(), num_layers=2, hidden=3)
  points = jax.random.normal(jax.random.key(1), (10, 2))
  np.testing.assert_allclose(
    jax.vmap(flow.logdensity)(points),
    jax.vmap(start().logdensity)(points),
    rtol=1e-10,
  )


def test_expectations_are_those_of_draws(x64):
  settings = proposal_fits.FitSettings(heavy_weight=0.1)
  flow = proposal_fits.with_heavy_part(bent(2, 0.2), settings)
  functional = expectations.means_and_squares(2)
  mean, error = flows.expectation(
    jax.random.key(0), functional, flow, num_points=2048
  )
  draws = jax.jit(jax.vmap(flow.sample))(
    jax.random.split(jax.random.key(1), 200_000)
  )
  values = np.asarray(jax.vmap(functional)(draws))
  drawn, spread = values.mean(0), values.std(0) / np.sqrt(len(values))
  assert np.all(np.abs(mean - drawn) < 4 * np.hypot(error, spread))
  # 16 repeats of 2,048 draws would have 2.5 times the error of these draws.
  light = dataclasses.replace(flow, base=flow.base.parts[0])
  _, error = flows.expectation(
    jax.random.key(0), functional, light, num_points=2048
  )
  assert np.all(error < spread / 4)


def test_a_flow_is_worth_more_than_the_best_gaussian(x64):
  settings = proposal_fits.FitSettings(
    objective="both",
    gradient_steps=600,
    gradient_draws=64,
    num_chains=32,
    num_steps=200,
    num_frozen_steps=100,
  )
  flow = flows.coupling(jax.random.key(0), start(), hidden=8, kept=((0,), (0,)))
  fit = adaptive_independent_metropolis.adapt(
    jax.random.key(1), banana, flow, settings
  )
  # Measured: 0.957 and 0.008; the best Gaussian has 0.57 and 0.45.
  assert fit.report.acceptance_rate > 0.93
  assert 0 <= fit.report.kl_forward < 0.02
  expected = settings.gradient_steps * settings.gradient_draws
  assert fit.report.num_evaluations > expected
  functional = expectations.coordinates(2)
  known, error = flows.expectation(
    jax.random.key(2), functional, fit.proposal, num_points=2048
  )
  run = independent_blocks.run_chains(
    jax.random.key(3), banana, fit.proposal, fit.state, 500,
    functional=functional, expectation=known, block_size=50,
  )  # fmt: skip
  result = estimates.estimate(run.carry)
  gap = np.abs(result.mean - np.array([0, 0.5]))
  assert np.all(gap < 4 * np.hypot(result.mcse, error))
  assert np.all(result.ess > 3 * result.num_draws)


def test_bad_arguments_are_named():
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=r"kept must name some of 2 coordinates"):
    flows.coupling(key, start(), kept=((0, 1),))
  with pytest.raises(ValueError, match=r"kept must name some of 2 coordinates"):
    flows.coupling(key, start(), kept=((2,),))
  flow = flows.coupling(key, start(), num_layers=1)
  functional = expectations.coordinates(2)
  with pytest.raises(ValueError, match=r"num_points must be a power of 2"):
    flows.expectation(key, functional, flow, num_points=1000)
  with pytest.raises(ValueError, match=r"Use flows.expectation for a flow"):
    expectations.expectation(functional, flow)
  heavy = proposal_fits.with_heavy_part(flow, proposal_fits.FitSettings())
  with pytest.raises(ValueError, match=r"start must have a Gaussian base"):
    flow_fits.fit_reverse_kl(key, banana, heavy, proposal_fits.FitSettings())
