# SPDX-License-Identifier: Apache-2.0
"""Effective sample sizes of our samplers and their peers, per second too.

Writes WORKDIR/records.jsonl, a line a sampler, and for each row of the config a
picture of traces and autocorrelations; the same command goes on where an
earlier one stopped. Your own data: --config.rows[0].target=FILE.csv, a table
of numbers with a header whose last column is the label, 0 or 1.
"""

import dataclasses

import jax.numpy as jnp
import rich.console
import rich.table
from absl import app

from experiments.frame import flags_and_configs
from experiments.sampling import mcmc_figures, mcmc_runs, sampler_efficiency_run

_CONFIG, _WORKDIR = flags_and_configs.define()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(mcmc_runs.Settings):
  """Of the experiment."""

  rows: tuple[sampler_efficiency_run.Row, ...]


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  settings, run = mcmc_runs.begin(Settings, _CONFIG.value, _WORKDIR.value)
  done = {(r["row"], r["sampler"]) for r in run.found()}
  console = rich.console.Console(width=140)
  for number, row in enumerate(settings.rows):
    missing = [s for s in row.samplers if (number, s) not in done]
    if not missing:
      continue
    results = sampler_efficiency_run.measure(
      missing, row, settings.seed, jnp.dtype(settings.dtype)
    )
    for name, (measured, _) in zip(missing, results, strict=True):
      # "NAME@TARGET": another form of the same posterior.
      run.writer.write(
        row=number,
        target=row.target,
        sampler=name,
        in_turn_with=missing,
        **measured,
      )
      console.print(
        f"{row.target} {name}: {measured['min_ess_per_second']:.4g}"
      )
    traces = [chain for _, chain in results]
    mcmc_figures.chains(traces, missing, run.workdir / f"chains_{number}.png")
  console.print(table(run.found()))


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
