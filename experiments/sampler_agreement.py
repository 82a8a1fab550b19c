# SPDX-License-Identifier: Apache-2.0
"""Controlled means beside those of long runs of BlackJAX's NUTS."""

import dataclasses

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from absl import app

from experiments.frame import flags_and_configs
from experiments.sampling import mcmc_problems, mcmc_runs
from unisparse_jax import mcmc

_CONFIG, _WORKDIR = flags_and_configs.define()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(mcmc_runs.Settings):
  """Of the experiment.

  Attributes:
    targets: of logistic regression, see `mcmc_problems.make`.
    nuts_chains: of the reference.
    nuts_steps: of each, after a tenth as many; a multiple of 100.
    nuts_step_size: in coordinates whitened by Laplace's covariance.
    num_chains: of ours.
    num_steps: of each; a multiple of 50.
    acceptance: of ours.
    warm_up: steps of ours that adapt its step size.
  """

  targets: tuple[str, ...]
  nuts_chains: int = 8
  nuts_steps: int = 20_000
  nuts_step_size: float = 0.6
  num_chains: int = 100
  num_steps: int = 2_000
  acceptance: float = 0.85
  warm_up: int = 1000


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  settings, run = mcmc_runs.begin(Settings, _CONFIG.value, _WORKDIR.value)
  done = {r["target"] for r in run.found()}
  console = rich.console.Console(width=140)
  for target in settings.targets:
    if target not in done:
      measured = compare(target, settings)
      run.writer.write(target=target, **measured)
      console.print(target, measured)


def compare(name: str, settings: Settings) -> dict:
  """Gaps of the means of x and x^2, in combined Monte Carlo errors."""
  problem = mcmc_problems.make(name, jnp.dtype(settings.dtype))
  keys = jax.random.split(jax.random.key(settings.seed), 4)
  mean, error = _nuts(problem, settings, keys[0])
  state = jax.vmap(problem.init)(problem.start(keys[1], settings.num_chains))
  warm = mcmc.adaptation.adapt_step_size(
    keys[2],
    problem.step,
    state,
    settings.warm_up,
    rest=problem.rest,
    start=0.5,
    target_acceptance=settings.acceptance,
  )
  variates = mcmc.control_variates.poisson_terms(
    (mcmc.poisson.Linear(), mcmc.poisson.Square())
  )
  run = mcmc.run_chains(
    warm.rng_keys,
    problem.step,
    warm.state,
    settings.num_steps,
    parameters=(warm.step_size, *problem.rest),
    collector=variates.collector,
    carry=variates.init(warm.state.position),
    collector_parameters=(problem.reference(warm.step_size),),
    batch_size=50,
  )
  choice = mcmc.choose(run.carry, mcmc.control_variates.candidates(3))
  estimate = choice.estimate
  gaps = (estimate.mean - mean) / np.hypot(estimate.mcse, error)
  plain = (estimate.plain_mean - mean) / np.hypot(estimate.plain_mcse, error)
  return {
    "acceptance_rate": float(np.mean(run.stats.acceptance_rate)),
    "largest_gap": float(np.abs(gaps).max()),
    "largest_plain_gap": float(np.abs(plain).max()),
    "mean_square_gap": float(np.mean(gaps**2)),
    "median_factor": float(np.median(estimate.factor)),
    "median_error_of_nuts_by_ours": float(np.median(error / estimate.mcse)),
    "gaps": gaps.tolist(),
  }


def _nuts(problem, settings: Settings, rng_key):
  """(means, their errors) of x and x^2 from batch means of all chains."""
  (a,) = problem.rest
  nuts = blackjax.nuts(
    problem.target.logdensity_fn, settings.nuts_step_size, a.matrix
  )
  start = problem.start(rng_key, settings.nuts_chains)
  state = jax.jit(jax.vmap(nuts.init))(start)

  def values(position):
    return jnp.concatenate([position, position**2])

  def trace(state, info):
    return values(state.position)

  def go(rng_key, state, num_steps):
    return mcmc.run_chains(
      rng_key, nuts.step, state, num_steps, batch_size=100, trace=trace
    )

  burned = go(rng_key, state, settings.nuts_steps // 10)
  chain = go(burned.rng_keys, burned.state, settings.nuts_steps).trace
  chain = np.asarray(chain, np.float64)
  means = chain.reshape(-1, 100, *chain.shape[1:]).mean(1)
  means = means.reshape(-1, means.shape[-1])
  return means.mean(0), means.std(0, ddof=1) / np.sqrt(len(means))


if __name__ == "__main__":
  flags_and_configs.run(main)
