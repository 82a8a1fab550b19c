# SPDX-License-Identifier: Apache-2.0
"""Pictures of speculative decoding, as PNG bytes."""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.decoding import speculation_config as config_lib
from experiments.decoding import speculation_summary as summary
from experiments.decoding import speculation_values
from experiments.prefill import figures

_COLOURS = (
  "#0969da", "#d1622b", "#2a8a4a", "#8250df", "#b8860b", "#c2255c", "#0e7490",
  "#5b6472", "#a0a8b4", "#6b4f1d", "#1b7f79", "#94398d", "#e85aad", "#7cb518",
  "#3d405b",
)  # fmt: skip


def all_figures(
  rows: Sequence[summary.Row],
) -> Iterator[figures.Picture]:
  """Title, sentence and PNG of every picture that the rows allow."""
  speed = [row for row in rows if row["kind"] == "speed"]
  means = [
    row for row in speed if row["domain"] == summary.MEAN and "speedup" in row
  ]
  for temperature in sorted({row["temperature"] for row in means}):
    here = [row for row in means if row["temperature"] == temperature]
    yield (
      f"Speed-up by batch size, temperature {temperature:g}",
      "Tokens per second over our own plain decoding, mean over domains; the "
      "bars reach from the slowest to the fastest domain.",
      _by_batch(here),
    )
  for temperature, batch in sorted(
    {(row["temperature"], row["batch"]) for row in means}
  ):
    here = [
      row
      for row in speed
      if (row["temperature"], row["batch"]) == (temperature, batch)
      and row["domain"] != summary.MEAN
      and row["method"] != config_lib.PLAIN
    ]
    yield (
      f"By domain, batch {batch}, temperature {temperature:g}",
      "Left: tokens per call of the target, bonus included. Right: verified "
      "nodes per token, against which the left is bought.",
      _by_domain(here),
    )
  adaptive = [
    row
    for row in speed
    if row["method"] in ("fixed", "heterospec")
    and row["domain"] != summary.MEAN
    and row["batch"] == min(r["batch"] for r in speed)
  ]
  if adaptive:
    yield (
      "Where accepted tokens rank, and how uncertain drafts are",
      "Left: rank by draft confidence of the deepest accepted node. Right: "
      "entropy of the best draft path at the base depth. Smallest batch.",
      _histograms(adaptive),
    )


def _colour(method: str) -> str:
  return _COLOURS[config_lib.METHODS.index(method)]


def _by_batch(rows) -> bytes:
  figure = figures.new_figure(8.5, 4.2)
  axes = figure.subplots()
  batches = sorted({row["batch"] for row in rows})
  methods = [
    m for m in config_lib.METHODS if any(r["method"] == m for r in rows)
  ]
  for number, method in enumerate(methods):
    line = sorted(
      (r for r in rows if r["method"] == method), key=lambda r: r["batch"]
    )
    shift = 0.06 * (number - (len(methods) - 1) / 2)
    x = np.array([batches.index(r["batch"]) for r in line]) + shift
    y = np.array([r["speedup"] for r in line])
    low = y - np.array([r["least_speedup"] for r in line])
    high = np.array([r["most_speedup"] for r in line]) - y
    axes.errorbar(
      x, y, yerr=[low, high], marker="o", markersize=4, linewidth=1.0,
      elinewidth=0.8, color=_colour(method), label=method,
    )  # fmt: skip
  axes.axhline(1.0, color="#5b6472", linewidth=0.8)
  axes.set_xticks(range(len(batches)), [str(b) for b in batches])
  axes.set_xlabel("batch")
  axes.set_ylabel("times plain decoding")
  figure.legend(fontsize=7, ncols=7, frameon=False, loc="outside lower center")
  figures.tidy(axes)
  return figures.png(figure)


def _by_domain(rows) -> bytes:
  figure = figures.new_figure(10.5, 4.0)
  left, right = figure.subplots(1, 2)
  names = sorted({row["domain"] for row in rows})
  methods = [
    m for m in config_lib.METHODS if any(r["method"] == m for r in rows)
  ]
  width = 0.8 / max(len(methods), 1)
  for number, method in enumerate(methods):
    found = {r["domain"]: r for r in rows if r["method"] == method}
    for axes, value in ((left, "tokens_per_call"), (right, "nodes_per_token")):
      x = [i + number * width for i, n in enumerate(names) if n in found]
      y = [found[n][value] for n in names if n in found]
      axes.bar(x, y, width, color=_colour(method), label=method)
  for axes, title in (
    (left, "tokens per call"), (right, "verified nodes per token")
  ):  # fmt: skip
    axes.set_xticks(
      [i + 0.4 - width / 2 for i in range(len(names))], names, fontsize=7
    )
    axes.set_title(title, fontsize=9)
    figures.tidy(axes, "y")
  figure.legend(
    *left.get_legend_handles_labels(),
    loc="outside lower center", ncols=7, fontsize=7, frameon=False,
  )  # fmt: skip
  return figures.png(figure)


def _histograms(rows) -> bytes:
  figure = figures.new_figure(10.5, 3.6)
  left, right = figure.subplots(1, 2)
  for method in dict.fromkeys(row["method"] for row in rows):
    mine = [r for r in rows if r["method"] == method]
    ranks = _sum([r["terminal_rank_histogram"] for r in mine])
    entropy = _sum([r["entropy_histogram"] for r in mine])
    colour = _colour(method)
    left.step(
      np.arange(len(ranks)), ranks / max(ranks.sum(), 1), where="mid",
      color=colour, label=method,
    )  # fmt: skip
    right.stairs(
      entropy / max(entropy.sum(), 1),
      speculation_values.ENTROPY_EDGES,
      color=colour,
    )
  left.set_xlabel("rank; 0: nothing accepted")
  left.set_ylabel("share of calls")
  left.legend(fontsize=8, frameon=False)
  right.set_xlabel("entropy, nats")
  for axes in (left, right):
    figures.tidy(axes, "y")
  return figures.png(figure)


def _sum(histograms) -> np.ndarray:
  total = np.zeros(max(map(len, histograms)))
  for histogram in histograms:
    total[: len(histogram)] += histogram
  return total
