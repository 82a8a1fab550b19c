# SPDX-License-Identifier: Apache-2.0
"""What speculative decoding brings, by domain, temperature and batch size.

Measures plain decoding and every method of the config: tokens per call of the
target, verified nodes, times, tokens per second, where accepted tokens ranked,
and whether the output is that of plain decoding. The methods of a domain are
timed in turns, on the text that plain decoding writes, and compared within each
turn. Writes WORKDIR/records.jsonl, a line a measurement, and
WORKDIR/report.html.

The same command goes on where an earlier one stopped.
"""

import math
import pathlib
import time

import rich.console
from absl import app

from experiments import long_context
from experiments.decoding import (
  speculation_config,
  speculation_plan,
  speculation_report,
  speculation_summary,
  speculative_speedup_run,
)
from experiments.frame import flags_and_configs, runs
from experiments.prefill import long_context_config
from unisparse_jax import models
from unisparse_jax.speculative import head_files

_CONFIG, _WORKDIR = flags_and_configs.define()
_FREE = ("max_seconds", "compile_threads")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = speculation_config.parse(_CONFIG.value)
  console = long_context.make_console()
  found, workdir = measure_all(config, _WORKDIR.value, console)
  if not found:
    console.print("Nothing was measured within max_seconds.")
    return
  rows = speculation_summary.summarise(found)
  for table in speculation_summary.tables(rows):
    console.print(table)
  if (long := speculation_summary.long_table(found)) is not None:
    console.print(long)
  report = speculation_report.write(found, workdir)
  console.print(f"Report: {report}", soft_wrap=True)


def measure_all(
  config: speculation_config.SpeculationConfig,
  workdir: str,
  console: rich.console.Console,
) -> tuple[list[dict], pathlib.Path]:
  """Takes the measurements that a workdir lacks, as the budget allows.

  Args:
    config: the settings.
    workdir: folder of the run.
    console: where progress is printed.

  Returns:
    All records of the run, and its folder.

  Raises:
    ValueError: the settings do not fit the model, the artefact is of another
      drafter, or the folder is not this run's.
  """
  limit = math.inf if config.max_seconds is None else config.max_seconds
  deadline = time.monotonic() + limit
  folder = long_context_config.model_folder(config.target)
  config.check_model(models.load_hf_config(folder))
  head = speculation_config.head_folder(config.head)
  identity = {
    **vars(config),
    "target_sha256": long_context_config.weights_hash(folder),
    "head_sha256": long_context_config.file_hash(head / head_files.WEIGHTS),
  }
  if config.wants_artefact:
    artefact = pathlib.Path(config.artefact)
    if not artefact.is_file():
      raise ValueError(
        f"config.artefact must be a file; got artefact={config.artefact!r}; "
        "expected what experiments.calibrate_speculation wrote."
      )
    identity["artefact_sha256"] = long_context_config.file_hash(artefact)
  run = runs.begin(workdir, identity, free=_FREE)
  groups = speculation_plan.plan(config)
  found = run.found()
  done = {speculation_plan.key(record) for record in found}
  missing = [[s for s in group if s.key not in done] for group in groups]
  missing = [group for group in missing if group]
  total, left = (sum(map(len, some)) for some in (groups, missing))
  console.print(
    f"{total} measurements of {folder.name}, {total - left} of them recorded "
    "already"
  )
  if not missing:
    return found, run.workdir
  measurer = speculative_speedup_run.Measurer(config, run.workdir)
  for group in missing:
    begin = time.monotonic()
    if begin < deadline:
      measurer.warm(group)
    if time.monotonic() >= deadline:
      console.print(
        f"{left} measurements are left: max_seconds is used up. The same "
        "command goes on."
      )
      break
    for step, values in zip(group, measurer.measure(group), strict=True):
      left -= 1
      run.writer.write(**vars(step), **values)
      speed = ""
      if "tokens_per_s" in values:
        speed = f"{values['tokens_per_s']:,.0f} tokens/s, "
      console.print(
        f"[{total - left}/{total}] {step}: {values['tokens_per_call']:.2f} "
        f"tokens a call, {speed}{values['mismatched_rows']} of "
        f"{values['rows']} rows differ",
        markup=False,
        highlight=False,
        soft_wrap=True,
      )
    console.print(
      f"{len(group)} methods in {time.monotonic() - begin:.1f} s",
      highlight=False,
    )
  return run.found(), run.workdir


if __name__ == "__main__":
  flags_and_configs.run(main)
