# SPDX-License-Identifier: Apache-2.0
"""Peers of our samplers, and the comparison with long runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sampler_agreement
from experiments.sampling import mcmc_peers, mcmc_problems
from unisparse_jax import mcmc


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def means(sampler, start, num_steps, step_size):
  """(means of x over chains, their errors) after half as many steps."""

  def trace(state, info):
    return sampler.position(state)

  def go(rng_key, state, num_steps):
    return mcmc.run_chains(
      rng_key,
      sampler.step,
      state,
      num_steps,
      parameters=(step_size, *sampler.rest),
      batch_size=num_steps,
      trace=trace,
    )

  state = jax.jit(jax.vmap(sampler.init))(start)
  burned = go(jax.random.key(1), state, num_steps)
  draws = np.asarray(go(burned.rng_keys, burned.state, num_steps).trace)
  chains = draws.mean(0)
  return chains.mean(0), chains.std(0, ddof=1) / np.sqrt(len(chains))


def test_pcnl_is_crank_nicolson_langevin(x64):
  problem = mcmc_problems.make("gp:diabetes:6", jnp.float64)
  sampler = mcmc_peers.make("pcnl", problem)
  target, delta = problem.target, 0.8
  x = problem.start(jax.random.key(0), 1)[0]
  state = sampler.init(x)
  # (2 + delta) y = (2 - delta) x + 2 delta C grad + sqrt(8 delta) noise.
  step_size = jnp.float64(2 * delta / (2 + delta))
  _, info = sampler.step(jax.random.key(1), state, step_size)
  grad = target.matrix @ np.asarray(jax.grad(target.likelihood_fn)(x))
  expected = ((2 - delta) * x + 2 * delta * grad) / (2 + delta)
  found = target.from_white(info.proposal_mean)
  np.testing.assert_allclose(found, expected, atol=1e-6)  # the prior's jitter
  noise = np.sqrt(step_size * (2 - step_size))
  np.testing.assert_allclose(noise, np.sqrt(8 * delta) / (2 + delta))
  with pytest.raises(ValueError, match=r"expected a latent Gaussian model"):
    mcmc_peers.make("pcnl", mcmc_problems.make("simulated:20:1", jnp.float64))


@pytest.mark.parametrize(
  ("name", "peer", "step_size", "num_steps"),
  [("gp:diabetes:6", "pcnl", 0.7, 400), ("simulated:30:2", "rmhmc", 1.0, 100)],
)
def test_peers_agree_with_ours(name, peer, step_size, num_steps, x64):
  problem = mcmc_problems.make(name, jnp.float64)
  ours = "gi_latent_gaussian" if problem.is_latent else "gi_mala"
  start = problem.start(jax.random.key(0), 40)
  expected, error = means(
    mcmc_peers.make(ours, problem), start, 400, jnp.float64(0.8)
  )
  found, more = means(
    mcmc_peers.make(peer, problem), start, num_steps, jnp.float64(step_size)
  )
  assert np.max(np.abs(found - expected) / np.hypot(error, more)) < 4
  assert np.max(more / np.std(start, axis=0)) < 0.2


def test_agreement_finds_a_wrong_mean(x64, monkeypatch):
  settings = sampler_agreement.Settings(
    targets=("simulated:30:2",),
    nuts_chains=4,
    nuts_steps=1000,
    num_chains=20,
    num_steps=200,
    warm_up=100,
  )
  found = sampler_agreement.compare("simulated:30:2", settings)
  assert found["largest_gap"] < 4
  assert 0.1 < found["mean_square_gap"] < 3
  assert found["median_factor"] > 2
  nuts = sampler_agreement._nuts

  def shifted(*arguments):
    mean, error = nuts(*arguments)
    return mean + 8 * error, error

  monkeypatch.setattr(sampler_agreement, "_nuts", shifted)
  wrong = sampler_agreement.compare("simulated:30:2", settings)
  assert wrong["largest_gap"] > 4
