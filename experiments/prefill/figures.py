# SPDX-License-Identifier: Apache-2.0
"""Pictures of the long-context experiment, as PNG bytes."""

import collections
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.collections
import matplotlib.colors
import matplotlib.figure
import numpy as np

from experiments.prefill import long_context_config
from experiments.prefill import long_context_summary as summary

Picture = tuple[str, str, bytes]  # title, note, PNG
_DPI = 110
_INK = "#1b1f24"
_ATTENTION = "#0969da"
_SELECTION = "#d1622b"
_COLOURS = (
  "#a0a8b4",
  "#5b6472",
  "#0969da",
  "#d1622b",
  "#2a8a4a",
  "#8250df",
  "#b8860b",
  "#c2255c",
  "#0e7490",
  "#7a4a21",
  "#e377c2",
  "#8a9a0b",
  "#1b1f24",
)
_MARKERS = "oosD^vP*X"


def all_figures(
  records: Sequence[dict[str, Any]], rows: list[dict], workdir: pathlib.Path
) -> Iterator[Picture]:
  """Title, sentence and PNG of every picture that the records allow."""
  style = styles(rows)
  sparse = [row for row in rows if "density" in row]
  if sparse:
    yield (
      "Quality against density",
      "Each point is a pattern, a line a sweep of top_p, filled at the "
      "shortest length. Left: mean task score as a share of the dense score, "
      "or, without answers, the divergence of next tokens, where lower is "
      "better. Right: share of the dense softmax that "
      "the kept blocks hold, with a thin line down to its 1st percentile.",
      _quality(sparse, families(records[-1]["settings"]["patterns"])),
    )
  timed = [row for row in rows if "total_ms" in row]
  if timed:
    yield (
      "Time of one layer's attention",
      "Selection and attention of one layer's real queries, keys and values; "
      "shorter is better.",
      _times(timed, style),
    )
  prefills = [row for row in rows if "prefill_ms" in row]
  if prefills:
    yield (
      "Time to the first token",
      "The whole model: every layer's projections and attention, the cache "
      "written, one token chosen.",
      _prefill(prefills, style),
    )
  for length in sorted({row["length"] for row in rows}):
    scores = summary.task_scores(records, length)
    if scores:
      yield (
        f"Score by task, {length:,} tokens",
        "Share of the expected answers found by greedy decoding, mean over "
        "the prompts of a task.",
        _tasks(scores, style),
      )
  for record in records:
    if record["kind"] == "masks" and (workdir / record["file"]).exists():
      yield (
        f"Masks over the true attention, {record['length']:,} tokens",
        "Colour: dense softmax mass of each block of keys, mean over the "
        "block's queries, on a log scale. Outlined: what "
        f"{record['pattern']} keeps. The heads are those that look most at "
        "their neighbourhood, at the first keys, everywhere, and at few "
        "blocks in between.",
        _masks(record, workdir / record["file"]),
      )


def families(patterns: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
  """{label: (settings without top_p, top_p)} of a config's patterns.

  A pattern that no other shares these settings with goes by its own label.
  """
  result = {}
  for entry in patterns:
    name = str(entry["method"])
    for key, value in sorted(entry.items()):
      if key not in ("label", "method", "measure", "top_p"):
        name += f" {key}={value}"
    result[entry["label"]] = (name, str(entry.get("top_p", "")))
  members = collections.Counter(name for name, _ in result.values())
  return {
    label: (name if members[name] > 1 else label, top_p)
    for label, (name, top_p) in result.items()
  }


def _quality(rows, family) -> bytes:
  figure = new_figure(10.5, 4.3)
  left, right = figure.subplots(1, 2)
  labels = {
    "relative_score": "score / dense score",
    "score": "score",
    "kl": "KL to dense attention, nats a token",  # without answers
  }
  score = next(
    (name for name in labels if any(name in row for row in rows)), "score"
  )
  groups: dict[tuple[str, int], list[dict]] = {}
  for row in sorted(rows, key=lambda row: row["density"]):
    name = family[row["pattern"]][0]
    groups.setdefault((name, row["length"]), []).append(row)
  style = styles([{"pattern": name} for name, _ in sorted(groups)], first=2)
  shortest = min(row["length"] for row in rows)
  for (name, length), group in sorted(groups.items()):
    look = style[name] | {
      "label": f"{name}, {length:,}",
      "fillstyle": "full" if length == shortest else "none",
      "linewidth": 1.0,
      "markersize": 6,
    }
    for axes, value in ((left, score), (right, "recall")):
      line = [row for row in group if value in row]
      axes.plot(
        [row["density"] for row in line], [row[value] for row in line], **look
      )
      for row in line if len(line) > 1 else ():
        axes.annotate(
          family[row["pattern"]][1],
          (row["density"], row[value]),
          xytext=(4, -9),
          textcoords="offset points",
          fontsize=7,
          color=look["color"],
        )
    for row in group:
      right.plot(
        [row["density"]] * 2,
        [row["recall_p1"], row["recall"]],
        color=look["color"],
        linewidth=1,
        alpha=0.4,
      )
  left.set(ylabel=labels[score])
  if score == "relative_score":
    left.axhline(1.0, color=_INK, linewidth=0.8, linestyle=":")
  right.set(ylabel="recall")
  for axes in (left, right):
    axes.set(xlabel="density (kept blocks / reachable blocks)")
    axes.set_xlim(0.0, 1.08 * max(row["density"] for row in rows))
    if axes is left and score == "kl":
      left.set_yscale("log")
    else:
      # A narrow range would make small differences look large.
      axes.set_ylim(min(0.5, axes.get_ylim()[0]), 1.03)
    tidy(axes)
  right.legend(
    frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0)
  )
  return png(figure)


def _times(rows, style) -> bytes:
  lengths = sorted({row["length"] for row in rows})
  if len(lengths) > 1:
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
      line = [row for row in rows if row["pattern"] == pattern]
      axes.plot(
        [row["length"] for row in line],
        [row["total_ms"] for row in line],
        label=_long_name(pattern),
        **style[pattern],
      )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    tidy(axes)
    axes.legend(
      frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0)
    )
    return png(figure)
  figure = new_figure(9, 0.9 + 0.45 * len(rows))
  axes = figure.subplots()
  place = np.arange(len(rows))
  select = np.array([row["select_ms"] for row in rows])
  total = np.array([row["total_ms"] for row in rows])
  select = np.minimum(select, total)
  axes.barh(
    place, total - select, left=select, color=_ATTENTION, label="attention"
  )
  axes.barh(place, select, color=_SELECTION, label="selection")
  for y, row in zip(place, rows, strict=True):
    note = f" {row['total_ms']:,.{0 if total.max() >= 100 else 1}f} ms"
    if row["pattern"] not in (
      long_context_config.DENSE,
      long_context_config.JAX_NN,
    ):
      faster = row.get("faster_than_dense", 1.0)
      note += f"  ({faster:.1f}x; {row['select_ms']:.1f} ms of it selection)"
    axes.text(row["total_ms"], y, note, va="center", fontsize=9, color=_INK)
  axes.set_yticks(place, [_long_name(row["pattern"]) for row in rows])
  axes.invert_yaxis()
  axes.set(xlabel=f"ms a layer, {lengths[0]:,} tokens")
  axes.set_xlim(0, 1.45 * total.max())
  tidy(axes, grid="x")
  axes.legend(frameon=False, fontsize=8, loc="lower right")
  return png(figure)


def _prefill(rows, style) -> bytes:
  figure = new_figure(9, 0.9 + 0.4 * len(rows))
  axes = figure.subplots()
  place = np.arange(len(rows))
  seconds = [row["prefill_ms"] / 1e3 for row in rows]
  axes.barh(
    place, seconds, color=[style[row["pattern"]]["color"] for row in rows]
  )
  for y, row, value in zip(place, rows, seconds, strict=True):
    note = f" {value:.2f} s  ({row.get('prefill_faster', 1.0):.1f}x)"
    axes.text(value, y, note, va="center", fontsize=9, color=_INK)
  axes.set_yticks(
    place, [f"{row['pattern']}, {row['length']:,}" for row in rows]
  )
  axes.invert_yaxis()
  axes.set(xlabel="seconds")
  axes.set_xlim(0, 1.2 * max(seconds))
  tidy(axes, grid="x")
  return png(figure)


def _tasks(scores, style) -> bytes:
  names = list(next(iter(scores.values())))
  figure = new_figure(10, 3.6)
  axes = figure.subplots()
  width = 0.8 / len(scores)
  place = np.arange(len(names))
  for i, (pattern, values) in enumerate(scores.items()):
    heights = [values.get(name, np.nan) for name in names]
    axes.bar(
      place + (i + 0.5) * width - 0.4,
      # A score of 0 shows as a line.
      np.maximum(heights, 0.006),
      0.92 * width,
      color=style[pattern]["color"],
      label=pattern,
    )
  many = len(names) > 6
  axes.set_xticks(
    place, names, rotation=30 if many else 0, ha="right" if many else "center"
  )
  axes.set(ylabel="score")
  axes.set_ylim(0, 1.02)
  tidy(axes, grid="y")
  axes.legend(
    frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0)
  )
  return png(figure)


def _masks(record, file: pathlib.Path) -> bytes:
  with np.load(file) as arrays:
    mass, kept = arrays["mass"], arrays["kept"]
  figure = new_figure(10, 9.2 if len(mass) > 2 else 5.0)
  grid = figure.subplots(
    2 if len(mass) > 2 else 1, 2, squeeze=False, sharex=True, sharey=True
  )
  num_q_blocks, num_kv_blocks = mass.shape[1:]
  norm = matplotlib.colors.LogNorm(1e-4, 1.0)
  rows = np.arange(num_q_blocks)[:, None]
  future = np.arange(num_kv_blocks)[None, :] * num_q_blocks >= (
    (rows + 1) * num_kv_blocks
  )
  image = None
  for axes, block_mass, mask, head in zip(
    grid.flat, mass, kept, record["heads"], strict=False
  ):
    shown = np.ma.masked_where(future, np.maximum(block_mass, 1e-4))
    image = axes.imshow(shown, norm=norm, cmap="YlGnBu", aspect="equal")
    axes.add_collection(
      matplotlib.collections.LineCollection(
        outline(mask), colors="#d1242f", linewidths=0.8
      )
    )
    held = (block_mass * mask).sum(1).mean()
    share = mask.sum() / (~future).sum()
    axes.set_title(
      f"layer {head[0]}, head {head[1]}: {share:.0%} of the blocks, "
      f"{held:.1%} of the mass",
      fontsize=10,
      pad=6,
    )
    axes.set(facecolor="#f3f5f7")
  for axes in grid[-1]:
    axes.set_xlabel("block of keys")
  for axes in grid[:, 0]:
    axes.set_ylabel("block of queries")
  for axes in grid.flat[len(mass) :]:
    axes.set_visible(False)
  figure.colorbar(
    image, ax=grid, shrink=0.6, pad=0.02, label="softmax mass of the block"
  )
  return png(figure)


def outline(mask: np.ndarray) -> list[list[tuple[float, float]]]:
  """Line segments between the kept blocks of a mask and all others.

  Args:
    mask: bool [num_rows, num_columns].

  Returns:
    Segments [(x, y), (x, y)] in the units of `imshow`.
  """
  padded = np.pad(mask.astype(bool), 1)
  segments = []
  for y, x in zip(*np.nonzero(padded[1:] != padded[:-1]), strict=True):
    # Between rows y - 1 and y of the mask.
    segments.append([(x - 1.5, y - 0.5), (x - 0.5, y - 0.5)])
  for y, x in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1]), strict=True):
    segments.append([(x - 0.5, y - 1.5), (x - 0.5, y - 0.5)])
  return segments


def _long_name(pattern: str) -> str:
  return {
    long_context_config.DENSE: "dense, tiled",
    long_context_config.JAX_NN: "dense, jax.nn",
  }.get(pattern, pattern)


def styles(rows, first: int = 0) -> dict[str, dict[str, Any]]:
  """Colour and marker of each pattern, the same in all pictures."""
  patterns = dict.fromkeys(row["pattern"] for row in rows)
  return {
    pattern: {
      "color": _COLOURS[i % len(_COLOURS)],
      "marker": _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)],
    }
    for i, pattern in enumerate(patterns, start=first)
  }


def new_figure(width: float, height: float) -> matplotlib.figure.Figure:
  return matplotlib.figure.Figure(
    figsize=(width, height), dpi=_DPI, layout="constrained"
  )


def tidy(axes, grid: str = "both"):
  axes.grid(axis=grid, color="#d9dee3", linewidth=0.6)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)


def png(figure) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", facecolor="white")
  return buffer.getvalue()
