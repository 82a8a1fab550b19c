# SPDX-License-Identifier: Apache-2.0
"""Quality of every pattern against its density and its measured time.

Each sweep of the config is one pattern at several budgets. Measures all of them
as `experiments.long_context` does, then draws task score, recall and KL against
density and against attention time with selection, and lists each pattern's
fastest measured budget that keeps the dense score, on the prompts that it is
reported on. Writes WORKDIR/records.jsonl, WORKDIR/matched.json and
WORKDIR/report.html. With `search` the answers of few budgets are asked for, see
`experiments.prefill.frontier_search`; with `compile_only` the programs are
compiled into the cache and nothing is measured, for which the model's folder
needs no weights; `beside` names records of an earlier run on the same model,
whose answers and layers are drawn with these.

The same command goes on where an earlier one stopped.
"""

import functools
import time

from absl import app

from experiments import long_context
from experiments.frame import flags_and_configs
from experiments.prefill import (
  frontier_config,
  frontier_figures,
  frontier_search,
  long_context_config,
  long_context_report,
  long_context_scanned,
  long_context_summary,
)
from unisparse_jax import data, models, records

_CONFIG, _WORKDIR = flags_and_configs.define()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  frontier = frontier_config.parse(_CONFIG.value)
  config, sweeps, share = frontier.run, frontier.sweeps, frontier.share
  console = long_context.make_console()
  if frontier.compile_only:
    compile_programs(config, _WORKDIR.value, console)
    return
  if frontier.search:
    found, workdir = frontier_search.measure(
      config, sweeps, share, _WORKDIR.value, console
    )
  else:
    found, workdir = long_context.measure_all(config, _WORKDIR.value, console)
  found = frontier.with_earlier(found)
  rows = long_context_summary.summarise(found)
  matched = frontier_figures.matched(rows, sweeps, share)
  records.write_json(workdir / "matched.json", matched)
  console.print(frontier_figures.matched_table(matched, share))
  report = long_context_report.write(
    found,
    workdir,
    functools.partial(frontier_figures.all_figures, sweeps=sweeps),
  )
  console.print(f"Report: {report}", soft_wrap=True)


def compile_programs(config, workdir, console):
  """Compiles what a run may need; another process may train meanwhile."""
  folder = long_context_config.model_folder(config.model)
  flags_and_configs.start_jax(workdir)
  tokenizer = data.Tokenizer.load(folder / "tokenizer.json")
  start = time.perf_counter()
  programs = long_context_scanned.compile_only(
    config, models.load_hf_config(folder), (tokenizer.newline_id,)
  )
  for key, error in programs.errors().items():
    console.print(f"{key[0]}: {error}", markup=False, soft_wrap=True)
  console.print(
    f"{programs.wait()} programs in {time.perf_counter() - start:.0f} s, "
    f"{programs.compile_s:.0f} s of all threads"
  )


if __name__ == "__main__":
  flags_and_configs.run(main)
