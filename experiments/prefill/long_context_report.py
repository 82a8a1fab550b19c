# SPDX-License-Identifier: Apache-2.0
"""The report of the long-context experiment: tables and pictures."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.frame import html_page
from experiments.prefill import figures, long_context_config
from experiments.prefill import long_context_summary as summary

Draw = Callable[..., Iterable[figures.Picture]]


def write(
  records: Sequence[dict[str, Any]],
  workdir: pathlib.Path,
  draw: Draw = figures.all_figures,
) -> pathlib.Path:
  """Writes WORKDIR/report.html beside itself, then renames.

  Args:
    records: of the experiment, at least one.
    workdir: its folder, with the arrays that records name.
    draw: makes the pictures from records, their summary and the folder.

  Returns:
    Path of the report.
  """
  rows = summary.summarise(records)
  last = records[-1]
  settings = last["settings"]
  lengths = sorted({record["length"] for record in records})
  page = html_page.Page(
    "Sparse prefill attention",
    title=f"Sparse prefill attention: {settings['model']}",
  )
  tokens = ", ".join(f"{length:,}" for length in lengths)
  page.note(
    html_page.describe(
      last, settings["model"], f"{tokens} tokens", settings["dtype"]
    )
  )
  for line in _headlines(rows):
    page.paragraph(line)
  page.section(
    "Quality",
    _table(
      [r for r in rows if r["pattern"] != long_context_config.JAX_NN],
      summary.QUALITY_COLUMNS,
    ),
    "Score is the mean over the tasks, decoding dense after a sparse "
    "prefill. Recall is the share of the dense softmax that the kept blocks "
    "hold, over queries, heads and layers: mean, 1st percentile, worst. "
    "Agreement, KL (nats) and loss are of the next token on held-out code.",
  )
  page.section(
    "Speed",
    _table(
      [r for r in rows if {"total_ms", "prefill_ms"} & r.keys()],
      summary.SPEED_COLUMNS,
    ),
    "Selection and attention are of one layer on its real input, mean over "
    "the timed layers; the ratios say how many times faster the whole is "
    "than the dense baseline. Time to the first token is of the whole model. "
    "Peak memory is what the compiled program holds, as the compiler counts.",
  )
  for title, note, picture in draw(records, rows, workdir):
    page.picture(title, picture, note)
  page.section(
    "Answers that went wrong",
    _wrong_answers(records),
    "Prompts that dense attention answers fully and a pattern does not.",
  )
  page.circumstances(last)
  return page.write(workdir / "report.html")


def _headlines(rows) -> list[str]:
  lines = []
  for row in rows:
    needed = {"relative_score", "density", "faster_than_dense"}
    if row["pattern"] == long_context_config.DENSE or needed - row.keys():
      continue
    line = (
      f"{row['pattern']} at {row['length']:,} tokens keeps "
      f"{row['relative_score']:.1%} of the dense score with "
      f"{row['density']:.1%} of the blocks; its attention, selection "
      f"included, is {row['faster_than_dense']:.1f} times as fast as tiled "
      "dense attention"
    )
    if "faster_than_jax_nn" in row:
      line += (
        f" and {row['faster_than_jax_nn']:.1f} times as fast as "
        "jax.nn.dot_product_attention"
      )
    lines.append(line + ".")
  return lines


def _table(rows, columns) -> str:
  used = [c for c in columns if any(c[0] in row for row in rows)]
  if not used:
    return ""
  return html_page.table(
    ("tokens", "pattern"),
    [heading for _, heading, _ in used],
    [
      ((f"{row['length']:,}", row["pattern"]), summary.cells(row, used))
      for row in rows
    ],
  )


def _wrong_answers(records) -> str:
  answers = {
    (r["pattern"], r["length"], r["item"]): r
    for r in records
    if r["kind"] == "answers"
  }
  lines = []
  for (pattern, length, task), record in answers.items():
    dense = answers.get((long_context_config.DENSE, length, task))
    if dense is None or record is dense:
      continue
    for i, (ours, theirs) in enumerate(
      zip(record["scores"], dense["scores"], strict=True)
    ):
      if ours < theirs == 1.0:
        lines.append(
          (
            pattern,
            f"{length:,}",
            task,
            "; ".join(record["targets"][i])[:80],
            record["texts"][i].split("\n", 1)[0][:80],
          )
        )
  names = ("pattern", "tokens", "task", "expected", "written")
  return html_page.table(names, (), [(line, ()) for line in lines[:40]])
