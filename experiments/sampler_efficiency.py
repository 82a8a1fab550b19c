# SPDX-License-Identifier: Apache-2.0
"""Effective sample sizes of our samplers and their peers, per second too."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from absl import app
from arviz_stats.base.array import array_stats

from experiments import (
  flags_and_configs,
  mcmc_figures,
  mcmc_peers,
  mcmc_problems,
)
from unisparse_jax import mcmc, records

_CONFIG, _WORKDIR = flags_and_configs.define()


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Of the experiment: its rows, seed, and "float32" or "float64"."""

  rows: tuple[Row, ...]
  seed: int = 0
  dtype: str = "float64"


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  settings = flags_and_configs.to_dataclass(
    Settings, _CONFIG.value, name="config"
  )
  jax.config.update("jax_enable_x64", settings.dtype == "float64")
  workdir = records.claim_workdir(_WORKDIR.value, settings)
  flags_and_configs.start_jax(workdir)
  file = workdir / "records.jsonl"
  found = records.read(file) if file.exists() else []
  done = {(r["row"], r["sampler"]) for r in found}
  writer = records.RecordWriter(file, settings)
  console = rich.console.Console(width=140)
  for number, row in enumerate(settings.rows):
    missing = [s for s in row.samplers if (number, s) not in done]
    if not missing:
      continue
    problem = mcmc_problems.make(row.target, jnp.dtype(settings.dtype))
    traces = {}
    for name in missing:
      sampler = mcmc_peers.make(name, problem)
      measured, traces[name] = measure(sampler, problem, row, settings.seed)
      writer.write(row=number, target=row.target, sampler=name, **measured)
      console.print(
        f"{row.target} {name}: {measured['min_ess_per_second']:.4g}"
      )
    mcmc_figures.chains(list(traces.values()), list(traces), workdir)
  console.print(table(records.read(file)))


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


def table(found: list[dict]) -> rich.table.Table:
  """All records, best minimal ESS per second of a target first."""
  result = rich.table.Table(title="bulk ESS over coordinates, all chains")
  columns = (
    "target",
    "sampler",
    "acceptance_rate",
    "min_ess",
    "median_ess",
    "seconds",
    "min_ess_per_second",
    "min_ess_per_cpu_second",
    "min_ess_per_gradient",
  )
  for column in columns:
    result.add_column(column)
  order = sorted(found, key=lambda r: (r["target"], -r["min_ess_per_second"]))
  for record in order:
    result.add_row(
      *(
        f"{record[c]:.4g}" if isinstance(record[c], float) else record[c]
        for c in columns
      )
    )
  return result


if __name__ == "__main__":
  flags_and_configs.run(main)
