# SPDX-License-Identifier: Apache-2.0
"""A self-contained HTML page of tables and pictures: every report's frame."""

import base64
import html
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unisparse_jax import records

_ENVIRONMENT = (
  "commit",
  "dirty",
  "platform",
  "device_kind",
  "num_devices",
  "cpu_count",
  "versions",
)
_STYLE = """
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


class Page:
  """A page that grows from top to bottom. Text is escaped, bodies are not.

  Args:
    heading: stands on top.
    title: of the browser's window; default: the heading.
  """

  def __init__(self, heading: str, *, title: str | None = None):
    self._parts = [
      "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
      "<meta name='viewport' content='width=device-width, initial-scale=1'>",
      f"<title>{escape(title or heading)}</title>",
      f"<style>{_STYLE}</style></head><body>",
      f"<h1>{escape(heading)}</h1>",
    ]

  def paragraph(self, text: str):
    """A paragraph of what is to be read first."""
    self._parts.append(f"<p>{escape(text)}</p>")

  def note(self, text: str):
    """A paragraph in grey: circumstances and definitions."""
    self._parts.append(f"<p class='note'>{escape(text)}</p>")

  def section(self, title: str, body: str, note: str = ""):
    """A heading, a note if any, and HTML; nothing at all without a body."""
    if not body:
      return
    self._parts.append(f"<h2>{escape(title)}</h2>")
    if note:
      self.note(note)
    self._parts.append(f"<div class='wide'>{body}</div>")

  def picture(self, title: str, png: bytes, note: str = ""):
    """A section with a picture, which lies in the page itself."""
    data = base64.b64encode(png).decode()
    image = f"<img alt='{escape(title)}' src='data:image/png;base64,{data}'>"
    self.section(title, image, note)

  def pictures(
    self, pictures: Iterable[tuple[str, str, bytes]], workdir: pathlib.Path
  ):
    """Sections of (title, note, PNG), which lie in WORKDIR/figure_N.png too."""
    for number, (title, note, png) in enumerate(pictures):
      (workdir / f"figure_{number}.png").write_bytes(png)
      self.picture(title, png, note)

  def circumstances(self, record: Mapping[str, Any]):
    """Settings and environment of a record, as JSON."""
    environment = {name: record[name] for name in _ENVIRONMENT}
    for title, value in (
      ("Settings", record["settings"]),
      ("Environment", environment),
    ):
      self.section(title, f"<pre>{escape(json.dumps(value, indent=2))}</pre>")

  def text(self) -> str:
    """The page so far, closed."""
    return "\n".join([*self._parts, "</body></html>\n"])

  def write(self, path: pathlib.Path) -> pathlib.Path:
    """Writes beside `path`, then renames; returns the absolute path."""
    path = path.absolute()
    records.write_text(path, self.text())
    return path


def table(
  names: Sequence[str],
  headings: Sequence[str],
  rows: Iterable[tuple[Sequence[Any], Sequence[Any]]],
) -> str:
  """A table; "" without headings or rows.

  Args:
    names: headings of the first columns, of words, set left.
    headings: of the other columns, of numbers, set right.
    rows: for each line the cells under `names` and those under `headings`.
  """
  lines = [
    "".join(f"<td class='name'>{escape(cell)}</td>" for cell in left)
    + "".join(f"<td>{escape(cell)}</td>" for cell in right)
    for left, right in rows
  ]
  if not lines:
    return ""
  head = "".join(f"<th class='name'>{escape(name)}</th>" for name in names)
  head += "".join(f"<th>{escape(heading)}</th>" for heading in headings)
  return (
    "<table>" + "".join(f"<tr>{x}</tr>" for x in (head, *lines)) + "</table>"
  )


def describe(record: Mapping[str, Any], *first: str) -> str:
  """A line on what was measured, on which device, and when."""
  device = f"{record['num_devices']} {record['device_kind']}"
  return " · ".join(
    [
      *first,
      f"{device} ({record['cpu_count']} cores)",
      f"jax {record['versions']['jax']}",
      record["time_utc"],
    ]
  )


def escape(value: Any) -> str:
  """Text that HTML shows as it is."""
  return html.escape(str(value), quote=True)
