# SPDX-License-Identifier: Apache-2.0
"""Sparse bidirectional and cross attention on videos of handwritten digits.

Trains a small reader whose tiles all look at one another and whose questions
look at all tiles, by `nnx.MultiHeadAttention` with our attention plugged in.
Then each pattern takes dense attention's place among the tiles, of the
questions, and in both: right answers, divergence of the answers, recall,
density and time. Writes WORKDIR/records.jsonl, WORKDIR/matched.json and
WORKDIR/report.html.

The same command goes on where an earlier one stopped.
"""

import dataclasses
import time

from absl import app

from experiments import long_context
from experiments.frame import flags_and_configs, runs
from experiments.prefill import frontier_figures
from experiments.vision import (
  vision_attention_config,
  vision_attention_data,
  vision_attention_report,
  vision_attention_run,
  vision_attention_train,
)
from unisparse_jax import records

_CONFIG, _WORKDIR = flags_and_configs.define()
# Fields that may differ between two calls on one workdir.
_FREE = ("measures", "sweeps", "mask_label")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = vision_attention_config.parse(_CONFIG.value)
  settings = dataclasses.asdict(config)
  run = runs.begin(_WORKDIR.value, settings, free=_FREE)
  workdir = run.workdir
  console = long_context.make_console()
  train_digits, test_digits = vision_attention_data.split_digits(config.seed)
  params = vision_attention_train.train(
    config, train_digits, workdir, run.writer, console.print
  )
  measurer = vision_attention_run.Measurer(config, params, test_digits, workdir)

  def take(steps):
    done = {
      vision_attention_run.key(r): r["point"]
      for r in run.found()
      if "item" in r
    }
    for step in steps:
      # A label may have meant another pattern in an earlier call.
      point = measurer.point(step)
      if done.get(step) != point:
        start = time.perf_counter()
        measured = measurer.measure(step)
        seconds = time.perf_counter() - start
        kind, label, item = step
        run.writer.write(
          kind=kind,
          pattern=label,
          item=item,
          **measured,
          point=point,
          seconds=seconds,
        )
        console.print(f"{' · '.join(step)}: {seconds:.1f} s", highlight=False)

  take(measurer.steps())
  rows = vision_attention_report.summarise(config, run.found())
  take(measurer.times(vision_attention_report.to_time(config, rows)))
  found = run.found()
  rows = vision_attention_report.summarise(config, found)
  console.print(vision_attention_report.table(rows))
  for line in vision_attention_report.refusals(found):
    console.print(line, highlight=False)
  matched = vision_attention_report.matched(config, rows)
  records.write_json(workdir / "matched.json", matched)
  for name, lines in matched.items():
    console.print(f"Sparse {name}")
    console.print(frontier_figures.matched_table(lines, config.matched_share))
  report = vision_attention_report.write(config, found, workdir)
  console.print(f"Report: {report}", soft_wrap=True)


if __name__ == "__main__":
  flags_and_configs.run(main)
