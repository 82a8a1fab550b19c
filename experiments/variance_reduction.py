# SPDX-License-Identifier: Apache-2.0
"""How much smaller control variates make the variance of posterior means."""

import dataclasses

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from absl import app

from experiments import (
  flags_and_configs,
  mcmc_figures,
  variance_reduction_run,
)
from unisparse_jax import records

_CONFIG, _WORKDIR = flags_and_configs.define()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Of the experiment: its rows, seed, and "float32" or "float64"."""

  rows: tuple[variance_reduction_run.Row, ...]
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
  done = {r["row"] for r in records.read(file)} if file.exists() else set()
  writer = records.RecordWriter(file, settings)
  for number, row in enumerate(settings.rows):
    if number not in done:
      # All lengths of a row at once: a row that was cut short starts anew.
      lengths = variance_reduction_run.measure(
        row, seed=settings.seed, dtype=jnp.dtype(settings.dtype)
      )
      for measured in list(lengths):
        writer.write(row=number, **dataclasses.asdict(row), **measured)
  found = records.read(file)
  rich.console.Console(width=140).print(table(found))
  mcmc_figures.factors(found, workdir)
  mcmc_figures.calibration(found, workdir)


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
