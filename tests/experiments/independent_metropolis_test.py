# SPDX-License-Identifier: Apache-2.0
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from experiments import independent_metropolis
from experiments.frame import flags_and_configs
from experiments.sampling import imh_evidence, imh_targets, imh_throughput

CONFIGS = pathlib.Path("configs/independent_metropolis")


@pytest.fixture(autouse=True, scope="module")
def quick_compile():
  """Less compilation for tests of many small programs."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=str)
def test_configs_are_understood(path):
  module = importlib.import_module(".".join(path.with_suffix("").parts))
  settings = flags_and_configs.to_dataclass(
    independent_metropolis.Settings, module.get_config(), name="config"
  )
  parts = (settings.posteriors, settings.evidence, settings.throughput)
  assert any(parts)


@pytest.mark.parametrize("prior", ["student_t", "laplace"])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_evidence_is_that_of_quadrature(prior, beta):
  problem = imh_evidence.Problem(prior=prior, dim=1, conflict=3.0)

  def integrand(x):
    point = np.array([x])
    level = beta * problem.log_likelihood(point[None])[0] - reference
    return np.exp(level + float(problem.prior_logdensity(jnp.asarray(point))))

  reference, draw = problem.power_posterior(beta)
  total, _ = scipy.integrate.quad(
    integrand, -40, 60, points=[0.0, 3.0], epsabs=1e-12, limit=200
  )
  np.testing.assert_allclose(total, 1, rtol=1e-8)
  mean, _ = scipy.integrate.quad(
    lambda x: x * integrand(x), -40, 60, points=[0.0, 3.0], limit=200
  )
  drawn = draw(np.random.default_rng(0), 20_000)[:, 0]
  assert abs(drawn.mean() - mean) < 4 * drawn.std() / np.sqrt(len(drawn))


def test_bridge_of_two_gaussians():
  rng = np.random.default_rng(0)
  wide, narrow = scipy.stats.norm(0.3, 1.2), scipy.stats.norm(0, 1)

  def log_ratio(x):
    return np.log(5) + wide.logpdf(x) - narrow.logpdf(x)

  found = imh_evidence.bridge(
    log_ratio(0.3 + 1.2 * rng.standard_normal(200_000)),
    log_ratio(rng.standard_normal(200_000)),
  )
  np.testing.assert_allclose(found, 5, rtol=5e-3)


def test_evidence_beats_its_peers():
  problem = imh_evidence.Problem(prior="laplace", dim=1, conflict=2.0)
  rows = imh_evidence.measure(problem, (0.5,), 20_000, 4)
  rmse = {method: values["relative_rmse"] for method, _, values in rows}
  assert rmse["im_fixed"] < rmse["crude"] / 5
  assert rmse["im_fixed"] < rmse["bridge"]
  # Crude Monte Carlo and the rest are right too, within their spread.
  assert max(rmse.values()) < 0.2


@pytest.mark.parametrize("centred", [True, False])
def test_eight_schools_draws_are_of_the_density(centred):
  case = imh_targets.eight_schools(centred=centred, reference_draws=1000)
  draws = imh_targets.eight_schools_draws(
    np.random.default_rng(1), 20_000, centred
  )
  # The score has mean zero under its own density, and no other.
  score = np.asarray(jax.vmap(jax.grad(case.logdensity_fn))(jnp.asarray(draws)))
  bounded = np.tanh(draws[:, :1])  # E[s g + g'] = 0 with g = tanh(mu)
  slope = 1 - bounded[:, 0] ** 2
  stein = bounded[:, 0] * score[:, 0] + slope
  kept = np.tanh(draws[:, 1])
  stein_tau = kept * score[:, 1] + 1 - kept**2
  for values in (stein, stein_tau):
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
  moved = stein_tau + 0.3 * kept * kept
  assert abs(moved.mean()) > 4 * moved.std() / np.sqrt(len(moved))


def test_throughput_runs_agree():
  found = {}
  with jax.enable_x64(False):
    for name in (imh_throughput.OURS, imh_throughput.BLACKJAX):
      settings = imh_throughput.Throughput(
        implementation=name,
        dim=3,
        num_data=40,
        num_chains=100,
        num_steps=200,
        block_size=50,
        repeats=1,
      )
      ((_, _, found[name]),) = imh_throughput.measure(settings)
  ours, theirs = found["ours"], found["blackjax"]
  gap = np.abs(ours["mean"] - theirs["mean"])
  assert np.all(gap < 4.5 * np.hypot(ours["mcse"], theirs["mcse"]))
  assert abs(ours["acceptance_rate"] - theirs["acceptance_rate"]) < 0.02
