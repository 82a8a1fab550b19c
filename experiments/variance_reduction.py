# SPDX-License-Identifier: Apache-2.0
"""How much smaller control variates make the variance of posterior means.

Writes WORKDIR/records.jsonl, a line a length of a row, and pictures of factors
against acceptance and of the calibration of intervals; the same command goes on
where an earlier one stopped. Your own data: --config.rows[0].target=FILE.csv, a
table of numbers with a header whose last column is the label, 0 or 1.
"""

import dataclasses

import jax.numpy as jnp
import rich.console
import rich.table
from absl import app

from experiments.frame import flags_and_configs
from experiments.sampling import mcmc_figures, mcmc_runs, variance_reduction_run

_CONFIG, _WORKDIR = flags_and_configs.define()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(mcmc_runs.Settings):
  """Of the experiment."""

  rows: tuple[variance_reduction_run.Row, ...]


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  settings, run = mcmc_runs.begin(Settings, _CONFIG.value, _WORKDIR.value)
  done = {r["row"] for r in run.found()}
  for number, row in enumerate(settings.rows):
    if number not in done:
      # All lengths of a row at once: a row that was cut short starts anew.
      lengths = variance_reduction_run.measure(
        row, seed=settings.seed, dtype=jnp.dtype(settings.dtype)
      )
      for measured in list(lengths):
        run.writer.write(row=number, **dataclasses.asdict(row), **measured)
  found = run.found()
  rich.console.Console(width=140).print(table(found))
  mcmc_figures.factors(found, run.workdir)
  mcmc_figures.calibration(found, run.workdir)


def table(found: list[dict]) -> rich.table.Table:
  """Median factors of the means, with their range."""
  result = rich.table.Table(title="variance of plain mean / controlled, F = x")
  names = list(found[0]["methods"]) if found else []
  for column in ("target", "length", "acceptance", *names):
    result.add_column(column)
  for record in found:
    cells = []
    for name in names:
      part = record["methods"].get(name, {}).get("linear")
      text = (
        ""
        if part is None
        else (f"{part['median']:.3g} ({part['min']:.2g}-{part['max']:.3g})")
      )
      cells.append(text)
    result.add_row(
      record["target"],
      str(record["length"]),
      f"{record['acceptance_rate']:.3f}",
      *cells,
    )
  return result


if __name__ == "__main__":
  flags_and_configs.run(main)
