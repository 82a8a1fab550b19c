# SPDX-License-Identifier: Apache-2.0
"""Effective sample sizes of samplers on one posterior, taking turns."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arviz_stats.base.array import array_stats

from experiments.sampling import mcmc_peers, mcmc_problems
from unisparse_jax import mcmc


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One posterior and the samplers that run on it.

  Attributes:
    target: see `mcmc_problems.make`.
    samplers: see `mcmc_peers.make`; "NAME@TARGET" runs on another form of the
      same posterior, such as a dense covariance where the rest uses FFT.
    num_chains: at once.
    warm_up: steps that adapt the step size.
    num_steps: of each chain, after warm-up.
    repeats: of the run; the first of two programs' runs is not timed.
    max_coordinates: evenly spaced ones whose ESS is taken, at most.
    shorter: samplers with a tenth of the steps: a step of NUTS moves farther
      and costs more, and ESS per second does not depend on their number.
  """

  target: str
  samplers: tuple[str, ...]
  num_chains: int = 4
  warm_up: int = 1000
  num_steps: int = 2000
  repeats: int = 10
  max_coordinates: int = 256
  shorter: tuple[str, ...] = ()

  def of(self, name: str) -> "Row":
    """The row as this sampler runs it."""
    if name not in self.shorter:
      return self
    return dataclasses.replace(
      self, warm_up=self.warm_up // 10, num_steps=self.num_steps // 10
    )


@dataclasses.dataclass(kw_only=True)
class _Running:
  """A sampler after warm-up, and what its timed runs gave."""

  sampler: mcmc_peers.Sampler
  row: Row
  trace: Any
  rng_key: Any
  state: Any
  step_size: Any
  sizes: list = dataclasses.field(default_factory=list)
  seconds: list = dataclasses.field(default_factory=list)
  cpu_seconds: list = dataclasses.field(default_factory=list)
  gradients: list = dataclasses.field(default_factory=list)
  rates: list = dataclasses.field(default_factory=list)
  one_chain: Any = None


def measure(
  names: list[str], row: Row, seed: int, dtype: Any
) -> list[tuple[dict, np.ndarray]]:
  """Medians over the repeats, and one chain of one coordinate, by sampler.

  The samplers take turns, repeat by repeat, so that what else the machine does
  falls on all alike.
  """
  problems = {}
  running = []
  for name in names:
    kind, _, other = name.partition("@")
    target = other or row.target
    if target not in problems:
      problems[target] = mcmc_problems.make(target, dtype)
    problem = problems[target]
    running.append(_warm_up(mcmc_peers.make(kind, problem), problem, row, seed))
  for number in range(row.repeats + 1):
    for one in running:
      # The first run compiles: it serves as warm-up and is dropped.
      _repeat(one, keep=number > 0)
  return [(_summary(one), one.one_chain) for one in running]


def _warm_up(sampler, problem, row: Row, seed: int) -> _Running:
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

  return _Running(
    sampler=sampler,
    row=row,
    trace=trace,
    rng_key=rng_key,
    state=state,
    step_size=step_size,
  )


def _repeat(one: _Running, *, keep: bool):
  row = one.row
  start, cpu_start = time.perf_counter(), time.process_time()
  run = mcmc.run_chains(
    one.rng_key,
    one.sampler.step,
    one.state,
    row.num_steps,
    parameters=(one.step_size, *one.sampler.rest),
    batch_size=row.num_steps,
    trace=one.trace,
  )
  jax.block_until_ready(run)
  seconds = time.perf_counter() - start
  cpu_seconds = time.process_time() - cpu_start
  one.rng_key, one.state = run.rng_keys, run.state
  if not keep:
    return
  draws, count, rate = map(np.asarray, run.trace)
  one.seconds.append(seconds)
  # Of all threads: unlike seconds, hardly moved by other work on the machine.
  one.cpu_seconds.append(cpu_seconds)
  one.sizes.append(
    [
      array_stats.ess(draws[:, :, j], chain_axis=1, draw_axis=0)
      for j in range(draws.shape[2])
    ]
  )
  one.gradients.append(float(count.mean()) * row.num_chains * row.num_steps)
  one.rates.append(float(rate.mean()))
  one.one_chain = draws[:, 0, 0]


def _summary(one: _Running) -> dict:
  sizes, seconds = np.array(one.sizes), np.array(one.seconds)
  cpu_seconds = np.array(one.cpu_seconds)
  lowest, middle = sizes.min(1), np.median(sizes, axis=1)
  return {
    "num_steps": one.row.num_steps,
    "step_size": float(one.step_size),
    "acceptance_rate": float(np.mean(one.rates)),
    "min_ess": float(np.median(lowest)),
    "median_ess": float(np.median(middle)),
    "max_ess": float(np.median(sizes.max(1))),
    "seconds": float(np.median(seconds)),
    "cpu_seconds": float(np.median(cpu_seconds)),
    "min_ess_per_cpu_second": float(np.median(lowest / cpu_seconds)),
    "min_ess_per_second": float(np.median(lowest / seconds)),
    "median_ess_per_second": float(np.median(middle / seconds)),
    "min_ess_per_gradient": float(np.median(lowest / one.gradients)),
    "all_min_ess_per_second": (lowest / seconds).tolist(),
    "all_min_ess_per_cpu_second": (lowest / cpu_seconds).tolist(),
  }
