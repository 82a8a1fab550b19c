# SPDX-License-Identifier: Apache-2.0
"""Records of the long-context experiment, put together a row a pattern."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.table

from experiments.prefill import long_context_config as config_lib

Row = dict[str, Any]
# Column of a table: name of a value, heading, format.
QUALITY_COLUMNS = (
  ("score", "score", "{:.3f}"),
  ("relative_score", "of dense", "{:.1%}"),
  ("worst_task", "worst task", "{:.1%}"),
  ("density", "density", "{:.3f}"),
  ("nominal_density", "nominal", "{:.3f}"),
  ("recall", "recall", "{:.4f}"),
  ("recall_p1", "p1", "{:.3f}"),
  ("cra", "worst", "{:.3f}"),
  ("relative_l1", "output error", "{:.3f}"),
  ("agreement", "agreement", "{:.1%}"),
  ("kl", "KL", "{:.4f}"),
  ("loss", "loss", "{:.3f}"),
)
SPEED_COLUMNS = (
  ("select_ms", "select ms", "{:.1f}"),
  ("attend_ms", "attend ms", "{:.1f}"),
  ("total_ms", "total ms", "{:.1f}"),
  ("faster_than_dense", "vs tiled", "{:.2f}x"),
  ("faster_than_jax_nn", "vs jax.nn", "{:.2f}x"),
  ("attention_mib", "peak MiB", "{:.0f}"),
  ("prefill_ms", "first token ms", "{:.0f}"),
  ("prefill_faster", "vs dense", "{:.2f}x"),
  ("prefill_mib", "peak MiB", "{:.0f}"),
)
_LAYER_MEANS = (
  "density",
  "nominal_density",
  "recall",
  "recall_p1",
  "relative_l1",
  "cosine",
)
_RANK = {config_lib.JAX_NN: 0, config_lib.DENSE: 1}
_TIMES = ("select_ms", "attend_ms", "total_ms")


def summarise(records: Sequence[Row]) -> list[Row]:
  """One row for each pattern and length; absent values were not measured.

  Args:
    records: as the experiment wrote them.

  Returns:
    Rows by length, at each the baselines first, the others in the order in
    which they were measured.
  """
  names = list(dict.fromkeys((r["length"], r["pattern"]) for r in records))
  names.sort(key=lambda name: (name[0], _RANK.get(name[1], len(_RANK))))
  rows = {name: _row(records, *name) for name in names}
  for (length, _), row in rows.items():
    dense = rows.get((length, config_lib.DENSE), {})
    jax_nn = rows.get((length, config_lib.JAX_NN), {})
    _compare_scores(row, task_scores(records, row["length"]))
    for name, base in (
      ("faster_than_dense", dense),
      ("faster_than_jax_nn", jax_nn),
    ):
      _ratio(row, name, base.get("total_ms"), row.get("total_ms"))
    _ratio(
      row, "prefill_faster", dense.get("prefill_ms"), row.get("prefill_ms")
    )
  return list(rows.values())


def quality_table(rows: Sequence[Row]) -> rich.table.Table:
  """Scores, next tokens and recall."""
  shown = [row for row in rows if row["pattern"] != config_lib.JAX_NN]
  return _table("Quality", shown, QUALITY_COLUMNS)


def speed_table(rows: Sequence[Row]) -> rich.table.Table:
  """Times of one layer's attention and to the first token."""
  shown = [row for row in rows if {"total_ms", "prefill_ms"} & row.keys()]
  return _table("Speed", shown, SPEED_COLUMNS)


def cells(row: Row, columns) -> list[str]:
  """Values of a row as text; those not measured are a dash."""
  return [
    form.format(row[name]) if name in row else "-" for name, _, form in columns
  ]


def task_scores(records: Sequence[Row], length: int) -> dict[str, Row]:
  """{pattern: {task: score}} at one length."""
  scores: dict[str, Row] = {}
  for record in records:
    if record["kind"] == "answers" and record["length"] == length:
      scores.setdefault(record["pattern"], {})[record["item"]] = record["score"]
  return scores


def _row(records, length: int, pattern: str) -> Row:
  row: Row = {"pattern": pattern, "length": length}
  by_kind: dict[str, list[Row]] = {}
  for record in records:
    if (record["length"], record["pattern"]) == (length, pattern):
      by_kind.setdefault(record["kind"], []).append(record)
  if answers := by_kind.get("answers"):
    row["score"] = float(np.mean([record["score"] for record in answers]))
  for record in by_kind.get("next_token", ()):
    row |= {name: record[name] for name in ("kl", "agreement", "loss")}
  if layers := by_kind.get("layers"):
    for name in _LAYER_MEANS:
      row[name] = float(np.mean([record[name] for record in layers]))
    row["cra"] = min(record["cra"] for record in layers)
  if times := by_kind.get("attention_time"):
    for name in _TIMES:
      row[name] = float(np.mean([record[name] for record in times]))
    _mebibytes(row, "attention_mib", [r["peak_bytes"] for r in times])
  for record in by_kind.get("prefill", ()):
    row["prefill_ms"] = record["median_ms"]
    _mebibytes(row, "prefill_mib", [record["peak_bytes"]])
  return row


def _compare_scores(row: Row, scores: dict[str, Row]):
  """Score over the dense one, of all tasks and of the worst, on equal tasks."""
  dense = scores.get(config_lib.DENSE, {})
  own = scores.get(row["pattern"], {})
  if not own or own.keys() != dense.keys():
    return
  _ratio(row, "relative_score", sum(own.values()), sum(dense.values()))
  shares = {task: own[task] / dense[task] for task in own if dense[task]}
  if shares:
    row["worst_task_name"] = min(shares, key=shares.__getitem__)
    row["worst_task"] = shares[row["worst_task_name"]]


def _mebibytes(row: Row, name: str, values):
  if all(value is not None for value in values):
    row[name] = max(values) / 2**20


def _ratio(row: Row, name: str, above, below):
  if above is not None and below:
    ratio = above / below
    if math.isfinite(ratio):
      row[name] = ratio


def _table(title: str, rows: Sequence[Row], columns) -> rich.table.Table:
  used = [c for c in columns if any(c[0] in row for row in rows)]
  table = rich.table.Table(title=title)
  table.add_column("tokens", justify="right")
  table.add_column("pattern", no_wrap=True)
  for _, heading, _ in used:
    table.add_column(heading, justify="right")
  length = None
  for row in rows:
    if length not in (None, row["length"]):
      table.add_section()
    length = row["length"]
    table.add_row(f"{length:,}", row["pattern"], *cells(row, used))
  return table
