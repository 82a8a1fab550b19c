# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML file of the speculative-speedup experiment."""

import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.decoding import speculation_figures
from experiments.decoding import speculation_summary as summary
from experiments.frame import html_page

_DEFINITIONS = (
  "A call is one row's share of one pass of the target. Tokens per call count "
  "the bonus token that the target adds; accepted tokens per call do not. "
  "Nodes are what was verified, root included; padded is what the compiled "
  "size had room for. Tokens per second and times are of decoding, prefill "
  "apart, of the median of the turns in which all methods of a domain were "
  "timed beside each other. Speeds over plain decoding and over the fixed tree "
  "are medians of the turns' ratios; s.e. is the standard error of the mean of "
  "the latter over the turns. A row differs where any token is not that of "
  "plain decoding in the same dtype; gap is the largest distance of the two "
  "tokens' logits where greedy rows part: near 0, they were tied."
)

_SAME_TEXT = (
  "Counts and times are of calls that are taken to write the text of plain "
  "decoding and compute all else as ever: in bfloat16 the methods part near "
  "ties, and another text has other tokens per call. Tokens per call on its "
  "text, and the rows that differ, are of a call before, untimed, that wrote "
  "its own."
)


def write(
  records: Sequence[dict[str, Any]], workdir: pathlib.Path
) -> pathlib.Path:
  """Writes WORKDIR/report.html and its pictures beside, then renames."""
  rows = summary.summarise(records)
  last = records[-1]
  settings = last["settings"]
  page = html_page.Page("Speculative decoding")
  page.note(html_page.describe(last, settings["target"], settings["dtype"]))
  page.note(_DEFINITIONS)
  if any("own_tokens_per_call" in r for r in rows):
    page.note(_SAME_TEXT)
  speed = [r for r in rows if r["kind"] == "speed"]
  page.section(
    "Mean over domains",
    _table([r for r in speed if r["domain"] == summary.MEAN]),
  )
  page.pictures(speculation_figures.all_figures(rows), workdir)
  for temperature, batch in dict.fromkeys(
    (r["temperature"], r["batch"]) for r in speed
  ):
    here = [
      r
      for r in speed
      if (r["temperature"], r["batch"]) == (temperature, batch)
      and r["domain"] != summary.MEAN
    ]
    page.section(f"Batch {batch}, temperature {temperature:g}", _table(here))
  page.section(
    "Long prompt and long answer",
    _table(summary.long_rows(records), summary.LONG_COLUMNS),
  )
  page.section(
    "float32 against plain decoding",
    _table([r for r in rows if r["kind"] == "exact"]),
  )
  page.circumstances(last)
  return page.write(workdir / "report.html")


def _table(rows, columns=None) -> str:
  columns = columns or summary.used_columns(rows)
  return html_page.table(
    ("T", "batch", "domain", "method"),
    [heading for _, heading, _ in columns],
    [
      (
        (
          f"{row['temperature']:g}",
          row["batch"],
          row["domain"],
          row["method"],
        ),
        summary.cells(row, columns),
      )
      for row in rows
    ],
  )
