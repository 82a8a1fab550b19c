# SPDX-License-Identifier: Apache-2.0
"""Quality of every pattern against its density and its measured time.

Each sweep of the config is one pattern at several budgets. Measures all of them
as `experiments.long_context` does, then draws task score, recall and KL against
density and against attention time with selection, and lists each pattern's
fastest budget that keeps the dense score. Writes WORKDIR/records.jsonl,
WORKDIR/matched.json and WORKDIR/report.html.

The same command goes on where an earlier one stopped.
"""

import functools

from absl import app

from experiments import (
  flags_and_configs,
  frontier_config,
  frontier_figures,
  html_report,
  long_context,
  long_context_summary,
)
from unisparse_jax import records

_CONFIG, _WORKDIR = flags_and_configs.define()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config, sweeps, share = frontier_config.parse(_CONFIG.value)
  console = long_context.make_console()
  found, workdir = long_context.measure_all(config, _WORKDIR.value, console)
  rows = long_context_summary.summarise(found)
  matched = frontier_figures.matched(rows, sweeps, share)
  records.write_json(workdir / "matched.json", matched)
  console.print(frontier_figures.matched_table(matched, share))
  report = html_report.write(
    found,
    workdir,
    functools.partial(frontier_figures.all_figures, sweeps=sweeps),
  )
  console.print(f"Report: {report}", soft_wrap=True)


if __name__ == "__main__":
  flags_and_configs.run(main)
