# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML file with tables and pictures of an experiment."""

import base64
import html
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments import figures, long_context_config
from experiments import long_context_summary as summary
from unisparse_jax import records as records_lib

Draw = Callable[..., Iterable[figures.Picture]]
ENVIRONMENT = (
  "commit",
  "dirty",
  "platform",
  "device_kind",
  "num_devices",
  "cpu_count",
  "versions",
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { margin: .3rem 0 .8rem; }
.note { color: #59636e; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d9dee3;
  text-align: right; white-space: nowrap; }
th { background: #f3f5f7; } td.name, th.name { text-align: left; }
img { max-width: 100%; height: auto; }
pre { background: #f3f5f7; padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""


def write(
  records: Sequence[dict[str, Any]],
  workdir: pathlib.Path,
  draw: Draw = figures.all_figures,
):
  """Writes WORKDIR/report.html beside itself, then renames.

  Args:
    records: of the experiment, at least one.
    workdir: its folder, with the arrays that records name.
    draw: makes the pictures from records, their summary and the folder.

  Returns:
    Path of the report.
  """
  path = workdir.absolute() / "report.html"
  text = render(records, workdir, draw)
  records_lib.write_text(path, text)
  return path


def render(
  records: Sequence[dict[str, Any]],
  workdir: pathlib.Path,
  draw: Draw = figures.all_figures,
) -> str:
  """The report's text."""
  rows = summary.summarise(records)
  last = records[-1]
  settings = last["settings"]
  lengths = sorted({record["length"] for record in records})
  parts = [
    "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
    "<meta name='viewport' content='width=device-width, initial-scale=1'>",
    f"<title>Sparse prefill attention: {_text(settings['model'])}</title>",
    f"<style>{STYLE}</style></head><body>",
    "<h1>Sparse prefill attention</h1>",
    f"<p class='note'>{_text(_subtitle(last, lengths))}</p>",
    *(f"<p>{_text(line)}</p>" for line in _headlines(rows)),
    *_section(
      "Quality",
      "Score is the mean over the tasks, decoding dense after a sparse "
      "prefill. Recall is the share of the dense softmax that the kept blocks "
      "hold, over queries, heads and layers: mean, 1st percentile, worst. "
      "Agreement, KL (nats) and loss are of the next token on held-out code.",
      _table(
        [r for r in rows if r["pattern"] != long_context_config.JAX_NN],
        summary.QUALITY_COLUMNS,
      ),
    ),
    *_section(
      "Speed",
      "Selection and attention are of one layer on its real input, mean over "
      "the timed layers; the ratios say how many times faster the whole is "
      "than the dense baseline. Time to the first token is of the whole model. "
      "Peak memory is what the compiled program holds, as the compiler counts.",
      _table(
        [r for r in rows if {"total_ms", "prefill_ms"} & r.keys()],
        summary.SPEED_COLUMNS,
      ),
    ),
  ]
  for title, note, picture in draw(records, rows, workdir):
    data = base64.b64encode(picture).decode()
    image = f"<img alt='{_text(title)}' src='data:image/png;base64,{data}'>"
    parts += _section(title, note, image)
  parts += _section(
    "Answers that went wrong",
    "Prompts that dense attention answers fully and a pattern does not.",
    _wrong_answers(records),
  )
  environment = {name: last[name] for name in ENVIRONMENT}
  for title, value in (("Settings", settings), ("Environment", environment)):
    parts += _section(
      title, "", f"<pre>{_text(json.dumps(value, indent=2))}</pre>"
    )
  parts.append("</body></html>\n")
  return "\n".join(parts)


def _subtitle(record, lengths) -> str:
  settings, versions = record["settings"], record["versions"]
  tokens = ", ".join(f"{length:,}" for length in lengths)
  return (
    f"{settings['model']} · {tokens} tokens · {settings['dtype']} · "
    f"{record['num_devices']} {record['device_kind']} "
    f"({record['cpu_count']} cores) · jax {versions['jax']} · "
    f"{record['time_utc']}"
  )


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


def _section(title: str, note: str, body: str) -> list[str]:
  if not body:
    return []
  parts = [f"<h2>{_text(title)}</h2>"]
  if note:
    parts.append(f"<p class='note'>{_text(note)}</p>")
  return [*parts, f"<div class='wide'>{body}</div>"]


def _table(rows, columns) -> str:
  used = [c for c in columns if any(c[0] in row for row in rows)]
  if not used:
    return ""
  head = "<th>tokens</th><th class='name'>pattern</th>"
  head += "".join(f"<th>{_text(heading)}</th>" for _, heading, _ in used)
  body = "".join(
    f"<tr><td>{row['length']:,}</td>"
    f"<td class='name'>{_text(row['pattern'])}</td>"
    + "".join(f"<td>{_text(cell)}</td>" for cell in summary.cells(row, used))
    + "</tr>"
    for row in rows
  )
  return f"<table><tr>{head}</tr>{body}</table>"


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
        cells = (
          pattern,
          f"{length:,}",
          task,
          "; ".join(record["targets"][i])[:80],
          record["texts"][i].split("\n", 1)[0][:80],
        )
        line = "".join(f"<td class='name'>{_text(c)}</td>" for c in cells)
        lines.append(f"<tr>{line}</tr>")
  if not lines:
    return ""
  head = "".join(
    f"<th class='name'>{name}</th>"
    for name in ("pattern", "tokens", "task", "expected", "written")
  )
  return f"<table><tr>{head}</tr>{''.join(lines[:40])}</table>"


def _text(value: Any) -> str:
  return html.escape(str(value), quote=True)
