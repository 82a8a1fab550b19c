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
  ("accepted_per_call", "accepted/call", "{:.2f}"),
  ("nodes_per_call", "nodes/call", "{:.1f}"),
  ("bucket_per_call", "padded", "{:.1f}"),
  ("nodes_per_token", "nodes/token", "{:.2f}"),
  ("levels_per_call", "levels", "{:.1f}"),
  ("calls", "calls", "{:.0f}"),
  ("tokens_per_s", "tokens/s", "{:,.0f}"),
  ("speedup", "vs plain", "{:.2f}x"),
  ("over_fixed", "vs fixed", "{:+.1%}"),
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
  for row in rows:
    if row.get("first_gaps"):
      row["largest_gap"] = max(row["first_gaps"])
  places = {(r["kind"], r["temperature"], r["batch"]) for r in rows}
  for kind, temperature, batch in sorted(places):
    here = [
      r
      for r in rows
      if (r["kind"], r["temperature"], r["batch"]) == (kind, temperature, batch)
    ]
    for method in dict.fromkeys(r["method"] for r in here):
      rows.append(_mean([r for r in here if r["method"] == method]))
  index = {_place(r, r["method"]): r for r in rows}
  for row in rows:
    plain = index.get(_place(row, config_lib.PLAIN))
    fixed = index.get(_place(row, "fixed"))
    if plain and row["method"] != config_lib.PLAIN:
      row["speedup"] = row["tokens_per_s"] / row.get(
        "plain_tokens_per_s", plain["tokens_per_s"]
      )
    if fixed and row["method"] not in (config_lib.PLAIN, "fixed"):
      row["over_fixed"] = _relative(row) / _relative(fixed) - 1.0
      row["nodes_over_fixed"] = (
        row["nodes_per_token"] / fixed["nodes_per_token"] - 1.0
      )
  # A mean of speed-ups: every domain counts alike.
  for row in rows:
    if row["domain"] == MEAN:
      for name in ("speedup", "over_fixed"):
        of_domains = [
          r[name]
          for r in rows
          if r["domain"] != MEAN
          and r["method"] == row["method"]
          and (r["kind"], r["temperature"], r["batch"])
          == (row["kind"], row["temperature"], row["batch"])
          and name in r
        ]
        if of_domains:
          row[name] = float(np.mean(of_domains))
          if name == "speedup":
            row["least_speedup"] = min(of_domains)
            row["most_speedup"] = max(of_domains)
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


def _relative(row: Row) -> float:
  """Speed, over that of plain decoding where both were timed in turn."""
  return row["tokens_per_s"] / row.get("plain_tokens_per_s", 1.0)


def _place(row: Row, method: str) -> tuple:
  return (row["kind"], row["temperature"], row["batch"], row["domain"], method)


def _mean(rows: Sequence[Row]) -> Row:
  """All domains of a method in one place; ratios of sums are noted as means."""
  first = rows[0]
  mean = {
    name: first[name] for name in ("kind", "method", "batch", "temperature")
  }
  mean |= {"domain": MEAN, "num_domains": len(rows)}
  for name in (
    "tokens_per_call",
    "accepted_per_call",
    "nodes_per_call",
    "bucket_per_call",
    "nodes_per_token",
    "levels_per_call",
    "tokens_per_s",
    "plain_tokens_per_s",
  ):
    if all(name in r for r in rows):
      mean[name] = float(np.mean([r[name] for r in rows]))
  for name in ("calls", "rows", "written", "mismatched_rows"):
    mean[name] = sum(r[name] for r in rows)
  if gaps := [r["largest_gap"] for r in rows if "largest_gap" in r]:
    mean["largest_gap"] = max(gaps)
  return mean


def tables(rows: Sequence[Row]) -> Iterator[rich.table.Table]:
  """Means over domains in one table; each place's domains in another."""
  speed = [r for r in rows if r["kind"] == "speed"]
  yield _table(
    "Mean over domains", [r for r in speed if r["domain"] == MEAN], "batch"
  )
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
