# SPDX-License-Identifier: Apache-2.0
"""Gaussians: how far acceptance is from 1, and what variance is left.

Every Gaussian-invariant sampler on Gaussians of growing condition number, in
float64, in float32, and in float32 in white coordinates: the largest
|log acceptance ratio| and the spread of the two-term estimator over chains, for
linear, square, product, exponential and tail functions.
"""

import dataclasses

import jax
import rich.console
import rich.table
from absl import app

from experiments.frame import flags_and_configs, runs
from experiments.sampling import gaussian_exactness_run

_CONFIG, _WORKDIR = flags_and_configs.define()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Of the experiment.

  Attributes:
    rows: of one sampler in one number format each.
    seed: of everything.
  """

  rows: tuple[gaussian_exactness_run.Row, ...]
  seed: int = 0


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  settings = flags_and_configs.to_dataclass(
    Settings, _CONFIG.value, name="config"
  )
  run = runs.begin(_WORKDIR.value, settings)
  done = {r["row"] for r in run.found()}
  for number, row in enumerate(settings.rows):
    if number in done:
      continue
    with jax.enable_x64(row.dtype == "float64"):
      for measured in list(gaussian_exactness_run.measure(row, settings.seed)):
        run.writer.write(row=number, **dataclasses.asdict(row), **measured)
  rich.console.Console(width=120).print(table(run.found()))


def table(found: list[dict]) -> rich.table.Table:
  """All records."""
  result = rich.table.Table(title="exact values are 0")
  columns = ("sampler", "dtype", "coordinates", "dim", "condition")
  for column in (*columns, "step size", "|log ratio|", "spread", "plain"):
    result.add_column(column, justify="right")
  for record in found:
    result.add_row(
      *(f"{record[c]:g}" if c == "condition" else str(record[c])
        for c in columns),
      f"{record['step_size']:g}",
      f"{record['max_abs_log_ratio']:.1e}",
      f"{record['max_relative_sd']:.1e}",
      f"{record['min_plain_relative_sd']:.1e}",
    )  # fmt: skip
  return result


if __name__ == "__main__":
  flags_and_configs.run(main)
