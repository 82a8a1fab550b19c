# SPDX-License-Identifier: Apache-2.0
"""What sparse prefill attention saves and costs on a real model and input.

For each pattern and length of the config: task scores beside the dense ones,
next-token agreement and KL on held-out code, recall and density, times of
selection and attention, time to the first token, memory. Writes
WORKDIR/records.jsonl, a line a measurement, and WORKDIR/report.html.

The same command goes on where an earlier one stopped.
"""

import functools
import os
import pathlib
import time

import jax.numpy as jnp
import rich.console
import rich.progress
from absl import app

from experiments.frame import flags_and_configs, runs
from experiments.prefill import (
  long_context_config,
  long_context_report,
  long_context_run,
  long_context_scanned,
  long_context_summary,
)
from unisparse_jax import models

_CONFIG, _WORKDIR = flags_and_configs.define()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = long_context_config.parse(_CONFIG.value)
  console = make_console()
  found, workdir = measure_all(config, _WORKDIR.value, console)
  report = finish(found, workdir, console)
  console.print(f"Report: {report}", soft_wrap=True)


class MeasuredRun:
  """A workdir with the records of a run, and what takes those it lacks.

  Args:
    config: the settings.
    workdir: folder of the run.

  Raises:
    ValueError: the settings do not fit the model, or the folder is not this
      run's.
  """

  def __init__(
    self, config: long_context_config.LongContextConfig, workdir: str
  ):
    self._start = time.monotonic()
    self.config = config
    self.folder = long_context_config.model_folder(config.model)
    self.model_config = models.load_hf_config(self.folder)
    config.check_model(self.model_config)
    self._run = runs.begin(
      workdir,
      long_context_config.identity(config, self.folder),
      free=long_context_config.FREE,
    )
    self.path = self._run.workdir
    self.found = self._run.found

  @functools.cached_property
  def measurer(self) -> long_context_run.Measurer:
    """What takes measurements; it loads the model."""
    kind = (
      long_context_scanned.ScannedMeasurer
      if self.config.scan_layers
      else long_context_run.Measurer
    )
    return kind(
      self.config,
      models.load_hf(self.folder, dtype=jnp.dtype(self.config.dtype)),
      long_context_run.held_out_code(self.folder, self.path),
      self.path,
    )

  def take(self, step: long_context_run.Step) -> dict:
    """Takes and records a measurement; its values, with "seconds"."""
    start = time.perf_counter()
    values = self.measurer.measure(step)
    values["seconds"] = time.perf_counter() - start
    self._run.writer.write(**vars(step), **values)
    return values

  def time_is_up(self) -> bool:
    """Whether no measurement may begin any more."""
    limit = self.config.max_seconds
    return limit is not None and time.monotonic() - self._start > limit


def measure_all(
  config: long_context_config.LongContextConfig,
  workdir: str,
  console: rich.console.Console,
) -> tuple[list[dict], pathlib.Path]:
  """Takes the measurements that a workdir lacks.

  Args:
    config: the settings.
    workdir: folder of the run.
    console: where progress is printed.

  Returns:
    All records of the run, and its folder.

  Raises:
    ValueError: the settings do not fit the model, or the folder is not this
      run's.
  """
  run = MeasuredRun(config, workdir)
  steps = long_context_run.plan(config, run.model_config.num_layers)
  if config.scan_layers:  # a clock waits for the compiler; the rest need not
    steps.sort(key=lambda step: step.kind in long_context_run.TIMED)
  done = {long_context_run.key(record) for record in run.found()}
  missing = [step for step in steps if step.key not in done]
  console.print(
    f"{len(steps)} measurements of {run.folder.name}, "
    f"{len(steps) - len(missing)} of them recorded already"
  )
  if missing:
    run_steps(run, missing, console)
  return run.found(), run.path


def run_steps(
  run: MeasuredRun,
  steps: list[long_context_run.Step],
  console: rich.console.Console,
):
  """Takes the steps, with a line each and, on a terminal, a bar.

  With scan_layers all that is left to compile is compiled beside them, and one
  that fails is told of and left out, with what its pattern lacks of its kind at
  that length: a card's minutes must not end with one program.
  """
  failed = set()
  if run.config.scan_layers:
    lengths = dict.fromkeys(step.length for step in steps)
    run.measurer.programs.ahead(*lengths)
  columns = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(
    *columns, console=console, disable=not console.is_terminal, transient=True
  ) as progress:
    bar = progress.add_task("", total=len(steps))
    for number, step in enumerate(steps, start=1):
      if run.time_is_up():
        console.print(f"time is up: {len(steps) - number + 1} are left")
        break
      progress.update(bar, description=str(step))
      progress.advance(bar)
      attempt = (step.kind, step.pattern, step.length)
      if attempt in failed:
        continue
      try:
        values = run.take(step)
      except Exception as error:
        if not run.config.scan_layers:
          raise
        failed.add(attempt)
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        console.print(f"[{number}] {step}: {reason}", markup=False)
        continue
      print_step(console, f"{number}/{len(steps)}", step, values)
  if run.config.scan_layers:
    run.measurer.programs.close()


def print_step(
  console: rich.console.Console,
  number: str,
  step: long_context_run.Step,
  values: dict,
):
  """One line on a measurement."""
  console.print(
    f"[{number}] {step}: {brief(step, values)} ({values['seconds']:.1f} s)",
    markup=False,
    highlight=False,
    soft_wrap=True,
  )


def brief(step: long_context_run.Step, values: dict) -> str:
  """The value of a measurement that a reader looks for first."""
  return {
    "answers": "score {score:.2f}",
    "next_token": "agreement {agreement:.1%}, KL {kl:.4f}",
    "layers": "density {density:.3f}, recall {recall:.4f}",
    "attention_time": "{total_ms:.1f} ms, selection {select_ms:.1f} ms",
    "prefill": "{median_ms:.0f} ms to the first token",
    "masks": "written to {file}",
  }[step.kind].format(**values)


def finish(
  found: list[dict], workdir: pathlib.Path, console: rich.console.Console
) -> pathlib.Path:
  """Prints the tables and writes the report."""
  rows = long_context_summary.summarise(found)
  console.print(long_context_summary.quality_table(rows))
  console.print(long_context_summary.speed_table(rows))
  return long_context_report.write(found, workdir)


def make_console() -> rich.console.Console:
  """A console; wide where the output is no terminal, so no line breaks."""
  console = rich.console.Console()
  if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 150
  return console


if __name__ == "__main__":
  flags_and_configs.run(main)
