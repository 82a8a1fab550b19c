# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML file of the speculative-speedup experiment."""

import base64
import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import html_report, speculation_figures
from experiments import speculation_summary as summary
from unisparse_jax import records as records_lib

_DEFINITIONS = (
  "A call is one row's share of one pass of the target. Tokens per call count "
  "the bonus token that the target adds; accepted tokens per call do not. "
  "Nodes are what was verified, root included; padded is what the compiled "
  "size had room for. Tokens per second and times are of decoding, prefill "
  "apart. A row differs where any token is not that of plain decoding in the "
  "same dtype; gap is the largest distance of the two tokens' logits where "
  "greedy rows part: near 0, they were tied."
)


def write(
  records: Sequence[dict[str, Any]], workdir: pathlib.Path
) -> pathlib.Path:
  """Writes WORKDIR/report.html and its pictures beside, then renames."""
  rows = summary.summarise(records)
  last = records[-1]
  settings = last["settings"]
  parts = [
    "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
    "<meta name='viewport' content='width=device-width, initial-scale=1'>",
    "<title>Speculative decoding</title>",
    f"<style>{html_report.STYLE}</style></head><body>",
    "<h1>Speculative decoding</h1>",
    "<p class='note'>"
    + _text(
      f"{settings['target']} · {settings['dtype']} · {last['num_devices']} "
      f"{last['device_kind']} · jax {last['versions']['jax']} · "
      f"{last['time_utc']}"
    )
    + "</p>",
    f"<p class='note'>{_text(_DEFINITIONS)}</p>",
  ]
  speed = [r for r in rows if r["kind"] == "speed"]
  parts += _section(
    "Mean over domains",
    _table([r for r in speed if r["domain"] == summary.MEAN]),
  )
  for number, (title, note, picture) in enumerate(
    speculation_figures.all_figures(rows)
  ):
    (workdir / f"figure_{number}.png").write_bytes(picture)
    data = base64.b64encode(picture).decode()
    image = f"<img alt='{_text(title)}' src='data:image/png;base64,{data}'>"
    parts += _section(title, f"<p class='note'>{_text(note)}</p>{image}")
  for temperature, batch in dict.fromkeys(
    (r["temperature"], r["batch"]) for r in speed
  ):
    here = [
      r
      for r in speed
      if (r["temperature"], r["batch"]) == (temperature, batch)
      and r["domain"] != summary.MEAN
    ]
    parts += _section(
      f"Batch {batch}, temperature {temperature:g}", _table(here)
    )
  if long := summary.long_rows(records):
    parts += _section(
      "Long prompt and long answer", _table(long, summary.LONG_COLUMNS)
    )
  exact = [r for r in rows if r["kind"] == "exact"]
  if exact:
    parts += _section("float32 against plain decoding", _table(exact))
  environment = {name: last[name] for name in html_report.ENVIRONMENT}
  for title, value in (("Settings", settings), ("Environment", environment)):
    text = _text(json.dumps(value, indent=2))
    parts += _section(title, f"<pre>{text}</pre>")
  parts.append("</body></html>\n")
  path = workdir.absolute() / "report.html"
  records_lib.write_text(path, "\n".join(parts))
  return path


def _section(title: str, body: str) -> list[str]:
  return [f"<h2>{_text(title)}</h2>", f"<div class='wide'>{body}</div>"]


def _table(rows, columns=None) -> str:
  columns = columns or summary.used_columns(rows)
  heads = ("T", "batch", "domain", "method")
  head = "".join(f"<th class='name'>{name}</th>" for name in heads)
  head += "".join(f"<th>{_text(heading)}</th>" for _, heading, _ in columns)
  lines = []
  for row in rows:
    names = (
      f"{row['temperature']:g}",
      row["batch"],
      row["domain"],
      row["method"],
    )
    line = "".join(f"<td class='name'>{_text(name)}</td>" for name in names)
    line += "".join(
      f"<td>{_text(cell)}</td>" for cell in summary.cells(row, columns)
    )
    lines.append(f"<tr>{line}</tr>")
  return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _text(value: Any) -> str:
  return html.escape(str(value), quote=True)
