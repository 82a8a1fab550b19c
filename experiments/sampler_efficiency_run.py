# SPDX-License-Identifier: Apache-2.0
"""Effective sample sizes of one sampler on one posterior."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from arviz_stats.base.array import array_stats

from unisparse_jax import mcmc


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One posterior and the samplers that run on it.

  Attributes:
    target: see `mcmc_problems.make`.
    samplers: see `mcmc_peers.make`.
    num_chains: at once.
    warm_up: steps that adapt the step size.
    num_steps: of each chain, after warm-up.
    repeats: of the run; the first of two programs' runs is not timed.
    max_coordinates: evenly spaced ones whose ESS is taken, at most.
  """

  target: str
  samplers: tuple[str, ...]
  num_chains: int = 4
  warm_up: int = 1000
  num_steps: int = 2000
  repeats: int = 10
  max_coordinates: int = 256


def measure(sampler, problem, row: Row, seed: int) -> tuple[dict, np.ndarray]:
  """Medians over the repeats, and one chain of one coordinate."""
  keys = jax.random.split(jax.random.key(seed), 3)
  state = jax.vmap(sampler.init)(problem.start(keys[0], row.num_chains))
  dtype = jax.tree.leaves(state)[0].dtype
  step_size, rng_key = jnp.ones((), dtype), keys[1]
  if sampler.acceptance is not None:
    warm = mcmc.adaptation.adapt_step_size(
      rng_key,
      sampler.step,
      state,
      row.warm_up,
      rest=sampler.rest,
      start=0.5,
      target_acceptance=sampler.acceptance,
    )
    rng_key, state, step_size = warm.rng_keys, warm.state, warm.step_size
  coordinates = np.asarray(
    problem.coordinates or range(problem.target.dim), np.int32
  )
  kept = np.linspace(0, len(coordinates) - 1, row.max_coordinates)
  kept = coordinates[np.unique(kept.astype(int))]

  def trace(state, info):
    rate = getattr(info, "acceptance_rate", jnp.ones(()))
    return sampler.position(state)[kept], sampler.gradients(info), rate

  sizes, seconds, cpu_seconds, gradients, rates = [], [], [], [], []
  for _ in range(row.repeats + 1):
    start, cpu_start = time.perf_counter(), time.process_time()
    run = mcmc.run_chains(
      rng_key,
      sampler.step,
      state,
      row.num_steps,
      parameters=(step_size, *sampler.rest),
      batch_size=row.num_steps,
      trace=trace,
    )
    jax.block_until_ready(run)
    seconds.append(time.perf_counter() - start)
    cpu_seconds.append(time.process_time() - cpu_start)
    rng_key, state = run.rng_keys, run.state
    draws, count, rate = map(np.asarray, run.trace)
    sizes.append(
      [
        array_stats.ess(draws[:, :, j], chain_axis=1, draw_axis=0)
        for j in range(draws.shape[2])
      ]
    )
    gradients.append(float(count.mean()) * row.num_chains * row.num_steps)
    rates.append(float(rate.mean()))
  # The first run compiles: it serves as warm-up and is dropped.
  sizes, seconds = np.array(sizes[1:]), np.array(seconds[1:])
  # Of all threads: unlike seconds, hardly moved by other work on the machine.
  cpu_seconds = np.array(cpu_seconds[1:])
  lowest, middle = sizes.min(1), np.median(sizes, axis=1)
  return {
    "step_size": float(step_size),
    "acceptance_rate": float(np.mean(rates[1:])),
    "min_ess": float(np.median(lowest)),
    "median_ess": float(np.median(middle)),
    "max_ess": float(np.median(sizes.max(1))),
    "seconds": float(np.median(seconds)),
    "cpu_seconds": float(np.median(cpu_seconds)),
    "min_ess_per_cpu_second": float(np.median(lowest / cpu_seconds)),
    "min_ess_per_second": float(np.median(lowest / seconds)),
    "median_ess_per_second": float(np.median(middle / seconds)),
    "min_ess_per_gradient": float(np.median(lowest / gradients[1:])),
    "all_min_ess_per_second": (lowest / seconds).tolist(),
  }, draws[:, 0, 0]
