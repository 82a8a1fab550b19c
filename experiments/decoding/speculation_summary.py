# SPDX-License-Identifier: Apache-2.0
"""Records of speculative decoding, put together a row a method and place."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rich.table

from experiments.decoding import speculation_config as config_lib

Row = dict[str, Any]
MEAN = "mean"  # domain of the rows that average over all
# Column of a table: name of a value, heading, format.
COLUMNS = (
  ("tokens_per_call", "tokens/call", "{:.2f}"),
  ("own_tokens_per_call", "on its text", "{:.2f}"),
  ("accepted_per_call", "accepted/call", "{:.2f}"),
  ("nodes_per_call", "nodes/call", "{:.1f}"),
  ("bucket_per_call", "padded", "{:.1f}"),
  ("nodes_per_token", "nodes/token", "{:.2f}"),
  ("levels_per_call", "levels", "{:.1f}"),
  ("calls", "calls", "{:.0f}"),
  ("tokens_per_s", "tokens/s", "{:,.0f}"),
  ("speedup", "vs plain", "{:.2f}x"),
  ("over_fixed", "vs fixed", "{:+.1%}"),
  ("over_fixed_error", "s.e.", "{:.1%}"),
  ("nodes_over_fixed", "nodes vs fixed", "{:+.1%}"),
  ("mismatched_rows", "rows differ", "{:.0f}"),
  ("largest_gap", "gap", "{:.3f}"),
)


def summarise(records: Sequence[Row]) -> list[Row]:
  """Rows with speed-ups, those over all domains added.

  Args:
    records: as the experiment wrote them.

  Returns:
    Rows by kind, temperature, batch and domain, in each by method.
  """
  # Long prompts have a table of their own.
  rows = [dict(r) for r in records if r["kind"] != "long"]
  index = {(*_place(r), r["domain"], r["method"]): r for r in rows}
  for row in rows:
    if row.get("first_gaps"):
      row["largest_gap"] = max(row["first_gaps"])
    beside = (*_place(row), row["domain"])
    if plain := index.get((*beside, config_lib.PLAIN)):
      _compare_plain(row, plain)
  for row in rows:
    if fixed := index.get((*_place(row), row["domain"], "fixed")):
      _compare_fixed(row, fixed)
  means = {}
  for place in sorted({_place(r) for r in rows}):
    here = [r for r in rows if _place(r) == place]
    for method in dict.fromkeys(r["method"] for r in here):
      mean = _mean([r for r in here if r["method"] == method])
      means[*place, method] = mean
  for row in means.values():
    if fixed := means.get((*_place(row), "fixed")):
      _compare_nodes(row, fixed)
  rows += means.values()
  order = {method: i for i, method in enumerate(config_lib.METHODS)}
  rows.sort(
    key=lambda r: (
      r["kind"],
      r["temperature"],
      r["batch"],
      r["domain"] != MEAN,
      r["domain"],
      order[r["method"]],
    )
  )
  return rows


def _place(row: Row) -> tuple:
  return (row["kind"], row["temperature"], row["batch"])


def _compare_plain(row: Row, plain: Row):
  """Adds the speed over plain decoding, of the median turn if there are any."""
  if row["method"] == config_lib.PLAIN or "tokens_per_s" not in row:
    return
  if "turn_over_plain" in row:
    row["speedup"] = float(np.median(row["turn_over_plain"]))
    return
  # Of an earlier version: timed beside each call, or once for all methods.
  beside = row.get("plain_tokens_per_s", plain["tokens_per_s"])
  row["speedup"] = row["tokens_per_s"] / beside


def _compare_fixed(row: Row, fixed: Row):
  """Adds speed and nodes over the fixed tree's, and the speed's error."""
  if row["method"] in (config_lib.PLAIN, "fixed"):
    return
  if turns := row.get("turn_over_fixed"):
    row["over_fixed"] = float(np.median(turns)) - 1.0
    if len(turns) > 1:
      error = np.std(turns, ddof=1) / np.sqrt(len(turns))
      row["over_fixed_error"] = float(error)
  elif "speedup" in row and "speedup" in fixed:
    row["over_fixed"] = row["speedup"] / fixed["speedup"] - 1.0
  _compare_nodes(row, fixed)


def _compare_nodes(row: Row, fixed: Row):
  if row["method"] not in (config_lib.PLAIN, "fixed"):
    row["nodes_over_fixed"] = (
      row["nodes_per_token"] / fixed["nodes_per_token"] - 1.0
    )


def _mean(rows: Sequence[Row]) -> Row:
  """A method in one place; every domain counts alike, in speed-ups too."""
  first = rows[0]
  mean = {
    name: first[name] for name in ("kind", "method", "batch", "temperature")
  }
  mean |= {"domain": MEAN, "num_domains": len(rows)}
  for name in (
    "tokens_per_call",
    "own_tokens_per_call",
    "accepted_per_call",
    "nodes_per_call",
    "bucket_per_call",
    "nodes_per_token",
    "levels_per_call",
    "tokens_per_s",
    "speedup",
    "over_fixed",
  ):
    if all(name in r for r in rows):
      mean[name] = float(np.mean([r[name] for r in rows]))
  if "speedup" in mean:
    mean["least_speedup"] = min(r["speedup"] for r in rows)
    mean["most_speedup"] = max(r["speedup"] for r in rows)
  # Of the turns: domains are what they are.
  if all("over_fixed_error" in r for r in rows):
    errors = [r["over_fixed_error"] for r in rows]
    mean["over_fixed_error"] = float(np.linalg.norm(errors)) / len(errors)
  for name in ("calls", "rows", "written", "mismatched_rows"):
    mean[name] = sum(r[name] for r in rows)
  if gaps := [r["largest_gap"] for r in rows if "largest_gap" in r]:
    mean["largest_gap"] = max(gaps)
  return mean


def tables(rows: Sequence[Row]) -> Iterator[rich.table.Table]:
  """Means over domains in one table; each place's domains in another."""
  speed = [r for r in rows if r["kind"] == "speed"]
  if speed:
    means = [r for r in speed if r["domain"] == MEAN]
    yield _table("Mean over domains", means, "batch")
  for temperature, batch in dict.fromkeys(
    (r["temperature"], r["batch"]) for r in speed
  ):
    here = [
      r
      for r in speed
      if (r["temperature"], r["batch"]) == (temperature, batch)
      and r["domain"] != MEAN
    ]
    yield _table(f"Batch {batch}, temperature {temperature:g}", here, "domain")
  exact = [r for r in rows if r["kind"] == "exact" and r["domain"] == MEAN]
  if exact:
    yield _table("float32 against plain decoding", exact, "batch")


def long_rows(records: Sequence[Row]) -> list[Row]:
  """Latency of a long prompt with a long answer, against dense and plain."""
  rows = [dict(r) for r in records if r["kind"] == "long"]
  base = {
    r["prompt_len"]: r["latency_s"]
    for r in rows
    if (r["method"], r["prefill"]) == (config_lib.PLAIN, "dense")
  }
  for row in rows:
    row["prefill_ms"] = 1e3 * row["prefill_s"] / row["rows"]
    row["latency_ms"] = 1e3 * row["latency_s"]
    if row["prompt_len"] in base:
      row["faster"] = base[row["prompt_len"]] / row["latency_s"]
  return rows


LONG_COLUMNS = (
  ("prompt_len", "prompt", "{:,}"),
  ("prefill", "prefill", "{}"),
  ("prefill_ms", "prefill ms", "{:.1f}"),
  ("latency_ms", "prompt and answer ms", "{:.1f}"),
  ("faster", "vs dense plain", "{:.2f}x"),
  ("tokens_per_call", "tokens/call", "{:.2f}"),
  ("mismatched_rows", "rows differ", "{:.0f}"),
)


def long_table(records: Sequence[Row]) -> rich.table.Table | None:
  """Table of `long_rows`; None where there are none."""
  rows = long_rows(records)
  if not rows:
    return None
  table = rich.table.Table(title="Long prompt and long answer")
  table.add_column("method")
  for _, heading, _ in LONG_COLUMNS:
    table.add_column(heading, justify="right")
  for row in rows:
    table.add_row(row["method"], *cells(row, LONG_COLUMNS))
  return table


def used_columns(rows: Sequence[Row]):
  """Columns that any row has."""
  return [c for c in COLUMNS if any(c[0] in row for row in rows)]


def cells(row: Row, columns) -> list[str]:
  """Values of a row as text; those not measured are a dash."""
  return [
    form.format(row[name]) if row.get(name) is not None else "-"
    for name, _, form in columns
  ]


def _table(title: str, rows: Sequence[Row], group: str) -> rich.table.Table:
  columns = used_columns(rows)
  table = rich.table.Table(title=title)
  if group == "batch":
    table.add_column("T", justify="right")
    table.add_column("batch", justify="right")
  else:
    table.add_column("domain")
  table.add_column("method", no_wrap=True)
  for _, heading, _ in columns:
    table.add_column(heading, justify="right")
  last = None
  for row in rows:
    place = (row["temperature"], row["batch"], row["domain"])
    if last not in (None, place):
      table.add_section()
    last = place
    head = [row["domain"]]
    if group == "batch":
      head = [f"{row['temperature']:g}", str(row["batch"])]
    table.add_row(*head, row["method"], *cells(row, columns))
  return table
