# SPDX-License-Identifier: Apache-2.0
"""Records of the vision experiment as rows, a table and one HTML file."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.table

from experiments.frame import html_page
from experiments.prefill import frontier_figures
from experiments.vision import (
  vision_attention_config,
  vision_attention_data,
  vision_attention_figures,
)

Row = dict[str, Any]
COLUMNS = (
  ("score", "score", "{:.3f}"),
  *((kind, kind, "{:.3f}") for kind in vision_attention_data.KINDS),
  ("relative_score", "of dense", "{:.1%}"),
  ("relative_frames", "scan, replay", "{:.1%}"),
  ("kl", "KL", "{:.4f}"),
  ("nominal_density", "density", "{:.3f}"),
  ("recall", "recall", "{:.4f}"),
  ("recall_p1", "p1", "{:.3f}"),
  ("cra", "worst", "{:.3f}"),
  ("select_ms", "select ms", "{:.1f}"),
  ("total_ms", "total ms", "{:.1f}"),
  ("faster_than_dense", "vs dense", "{:.2f}x"),
)
_QUALITY = ("density", "nominal_density", "recall", "recall_p1", "cra")
_TASK = (
  "A video of frames, each a grid of tiles that show a handwritten digit over "
  "the frame's own texture; a tile is a token. Scan: which digit is at a row "
  "and column of the frame with a texture that the question shows. Replay: of "
  "a frame, named by its time, whose tiles are empty and whose texture one "
  "other frame has, with digits. Sticker: of one empty tile, named by time, "
  "row and column, whose texture one tile elsewhere has, with a digit. Chance "
  "is 0.1. Digits are of images that training has not seen."
)
_TABLE = (
  "Sparse is the attention among the tiles (self), of the questions on the "
  "tiles (cross), or both. Density is kept pairs of tokens over all pairs; of "
  "both, over the pairs of all layers. Recall is of dense attention's inputs: "
  "mean, 1st percentile, worst. KL, nats, is of the answers' distribution to "
  "that with dense attention. Times are of one layer, selection included."
)


def summarise(
  config: vision_attention_config.VisionConfig, records: Sequence[Row]
) -> list[Row]:
  """One row for each place that is sparse and each point, dense ones first."""
  by_key = {
    (r["kind"], r["pattern"], r["item"]): r for r in records if "item" in r
  }
  # Pairs of tokens, over all layers of a site.
  pairs = np.array(
    [
      config.model.num_layers * config.num_tokens**2,
      config.num_questions * config.num_tokens,
    ],
    np.float64,
  )
  dense = vision_attention_config.DENSE
  base = by_key.get(("answers", dense, "both"), {})
  rows = []
  for where in vision_attention_config.WHERES:
    for label in (dense, *config.points):
      row: Row = {"where": where, "pattern": label, "length": config.num_tokens}
      answers = by_key.get(
        ("answers", label, "both" if label == dense else where)
      )
      if answers:
        names = ("score", "kl", "agreement", *vision_attention_data.KINDS)
        row |= {name: answers[name] for name in names}
        row |= _relative(row, base)
      if label == dense:
        row |= dict.fromkeys(_QUALITY, 1.0)
      elif layers := by_key.get(("layers", label, where)):
        row |= {name: layers[name] for name in _QUALITY}
      elif where == "both":
        parts = [
          by_key.get(("layers", label, site), {}).get("nominal_density")
          for site in vision_attention_config.SITES
        ]
        if None not in parts:
          row["nominal_density"] = float(np.average(parts, weights=pairs))
      if times := by_key.get(("attention_time", label, where)):
        row |= {name: times[name] for name in ("select_ms", "total_ms")}
        if slow := by_key.get(("attention_time", dense, where)):
          row["faster_than_dense"] = slow["total_ms"] / times["total_ms"]
      if len(row) > 3:
        rows.append(row)
  return rows


def to_time(
  config: vision_attention_config.VisionConfig, rows: Sequence[Row]
) -> dict[str, list[str]]:
  """{site: labels of the points whose time is of interest}.

  Of each sweep the sparsest point that keeps the share of the dense score, of
  all questions and of those about frames; where none keeps it, the fullest.
  """
  result = {}
  for site in vision_attention_config.SITES:
    here = {row["pattern"]: row for row in rows if row["where"] == site}
    chosen = []
    for sweep in config.all_sweeps:
      points = [
        here[label]
        for label in sweep.points
        if "nominal_density" in here.get(label, {})
      ]
      points.sort(key=lambda row: row["nominal_density"])
      for name in ("relative_score", "relative_frames"):
        kept = [r for r in points if r.get(name, 0.0) >= config.matched_share]
        chosen += [row["pattern"] for row in (kept[:1] or points[-1:])]
    result[site] = list(dict.fromkeys(chosen))
  return result


def matched(
  config: vision_attention_config.VisionConfig, rows: Sequence[Row]
) -> dict[str, list[Row]]:
  """`frontier_figures.matched` by what is sparse and what is asked."""
  found = {}
  for where in vision_attention_config.WHERES:
    for name, asked in (
      ("relative_score", "all questions"),
      ("relative_frames", "scan and replay"),
    ):
      here = [
        row | {"relative_score": row.get(name, 0.0)}
        for row in rows
        if row["where"] == where
      ]
      found[f"{where}: {asked}"] = frontier_figures.matched(
        here, config.all_sweeps, config.matched_share
      )
  return found


def refusals(records: Sequence[Row]) -> list[str]:
  """A line for each method that refuses an attention, with its reason."""
  return list(
    dict.fromkeys(
      f"{r['pattern']}, {r['item']}: {r['reason']}"
      for r in records
      if r["kind"] == "refused"
    )
  )


def table(rows: Sequence[Row]) -> rich.table.Table:
  """All rows."""
  result = rich.table.Table(title="Vision")
  for name in ("sparse", "pattern"):
    result.add_column(name, no_wrap=True)
  for _, heading, _ in COLUMNS:
    result.add_column(heading, justify="right")
  where = None
  for row in rows:
    if where not in (None, row["where"]):
      result.add_section()
    where = row["where"]
    result.add_row(where, row["pattern"], *_cells(row))
  return result


def write(
  config: vision_attention_config.VisionConfig,
  records: Sequence[Row],
  workdir: pathlib.Path,
) -> pathlib.Path:
  """Writes WORKDIR/report.html beside itself and renames; pictures as PNG."""
  rows = summarise(config, records)
  last = records[-1]
  page = html_page.Page("Bidirectional and cross attention")
  page.note(
    html_page.describe(
      last,
      f"{config.num_tokens:,} tokens",
      f"{config.num_questions} questions",
    )
  )
  page.paragraph(_TASK)
  for line in refusals(records):
    page.note(line)
  pictures = vision_attention_figures.all_figures(
    config, records, rows, workdir
  )
  page.pictures(pictures, workdir)
  page.section("All points", _html_table(rows), _TABLE)
  page.circumstances(last)
  return page.write(workdir / "report.html")


def _relative(row: Row, base: Row) -> dict[str, float]:
  """Scores over those of dense attention; 0 where that has none."""
  result = {}
  for name, score in (
    ("score", lambda r: r["score"]),
    ("frames", _frames),
    ("sticker", lambda r: r["sticker"]),
  ):
    reached = score(base)
    result[f"relative_{name}"] = score(row) / reached if reached else 0.0
  return result


def _frames(row: Row) -> float:
  """Score of the questions about frames, for which a block is little enough."""
  return (row["scan"] + row["replay"]) / 2.0


def _cells(row: Row) -> list[str]:
  return [
    form.format(row[name]) if name in row else "-" for name, _, form in COLUMNS
  ]


def _html_table(rows) -> str:
  return html_page.table(
    ("sparse", "pattern"),
    [heading for _, heading, _ in COLUMNS],
    [((row["where"], row["pattern"]), _cells(row)) for row in rows],
  )
