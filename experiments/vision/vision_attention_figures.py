# SPDX-License-Identifier: Apache-2.0
"""Pictures of the vision experiment, as PNG bytes."""

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.collections
import matplotlib.colors
import matplotlib.patches
import numpy as np

from experiments.prefill import figures, frontier_figures
from experiments.vision import vision_attention_config, vision_attention_data

_TITLES = {
  "self": "Among the tiles: bidirectional attention",
  "cross": "Questions on tiles: cross attention",
  "both": "Both at once",
}
_QUALITY = (
  ("relative_frames", "scan and replay / dense"),
  ("relative_sticker", "sticker / dense"),
  ("recall", "recall"),
  ("kl", "KL to dense, nats"),
)
_COST = (
  ("nominal_density", "density (kept pairs / all pairs)"),
  ("total_ms", "attention with selection, ms a layer"),
)
_KEPT, _ASKING, _SOUGHT = "#0969da", "#d1242f", "#2a8a4a"
_FRAMES_ACROSS = 12


def all_figures(
  config: vision_attention_config.VisionConfig,
  records: Sequence[dict[str, Any]],
  rows: Sequence[dict[str, Any]],
  workdir: pathlib.Path,
) -> Iterator[figures.Picture]:
  """Title, sentence and PNG of every picture that the records allow."""
  for where in vision_attention_config.WHERES:
    here = {row["pattern"]: row for row in rows if row["where"] == where}
    sweeps = [
      sweep
      for sweep in config.all_sweeps
      if any(label in here for label in sweep.points)
    ]
    sparse = [here[label] for sweep in sweeps for label in sweep.points]
    costs, qualities = (
      [pair for pair in pairs if any(pair[0] in row for row in sparse)]
      for pairs in (_COST, _QUALITY)
    )
    if costs and qualities:
      yield (
        _TITLES[where],
        "A line is a pattern, a point one of its budgets; the dotted lines are "
        "dense attention. Up (for KL, down) and to the left is better.",
        frontier_figures.frontier(here, sweeps, qualities, costs),
      )
  for record in records:
    if record["kind"] == "masks" and (workdir / record["file"]).exists():
      with np.load(workdir / record["file"]) as arrays:
        arrays = dict(arrays)
      row = asking_row(config, arrays["sources"], arrays["kept"])
      head = f"layer {record['layer']}, head {record['head']}"
      yield (
        "A video, and what one block of tiles looks at",
        f"{record['pattern']}, {head}. Red: the tiles of the block, most of "
        "them empty. Green: the tiles that hold what the empty ones seek. "
        "Bright: the tiles of the blocks that are kept for them.",
        _video(config, arrays, row),
      )
      yield (
        "The same head, all blocks",
        "Colour: dense softmax mass of each block of keys, mean over the "
        f"block's queries, on a log scale. Outlined: what {record['pattern']} "
        "keeps.",
        _mass(arrays, row),
      )


def asking_row(config, sources: np.ndarray, kept: np.ndarray) -> int:
  """The block of queries with most empty tiles that is sought for far off."""
  block_q = config.pattern(config.mask_label, "self").block_q
  away = np.abs(sources - np.arange(len(sources))) > 2 * block_q
  rows = np.arange(len(sources)) // block_q
  return int(np.bincount(rows, away, minlength=kept.shape[0]).argmax())


def _video(config, arrays, row: int) -> bytes:
  """The frames side by side, dark where no key is kept for one row."""
  pattern = config.pattern(config.mask_label, "self")
  video, tile = config.video, vision_attention_data.TILE
  sources, pixels = arrays["sources"], arrays["pixels"]
  across = min(_FRAMES_ACROSS, config.num_frames)
  down = math.ceil(config.num_frames / across)
  gap = 3  # pixels
  high, wide = video.rows * tile, video.columns * tile
  image = np.full(
    (down * (high + gap), across * (wide + gap), 3), 1.0, np.float32
  )
  kept = np.repeat(arrays["kept"][row], pattern.block_kv)[: len(sources)]
  first = row * pattern.block_q
  asking = np.arange(first, min(first + pattern.block_q, len(sources)))
  sought = sources[asking][sources[asking] != asking]
  corner = []
  tint = np.array(matplotlib.colors.to_rgb(_KEPT), np.float32)
  for token in range(len(sources)):
    frame, place = divmod(token, video.num_tiles)
    y = frame // across * (high + gap) + place // video.columns * tile
    x = frame % across * (wide + gap) + place % video.columns * tile
    corner.append((x, y))
    gray = pixels[token].reshape(tile, tile, 1)
    shown = 1.0 - (1.0 - 0.25 * tint) * gray if kept[token] else 0.9 - gray / 4
    image[y : y + tile, x : x + tile] = shown
  figure = figures.new_figure(11.0, 11.0 * image.shape[0] / image.shape[1])
  axes = figure.subplots()
  axes.imshow(image, interpolation="nearest")
  for tokens, colour in ((asking, _ASKING), (sought, _SOUGHT)):
    axes.add_collection(
      matplotlib.collections.PatchCollection(
        [
          matplotlib.patches.Rectangle(
            (corner[t][0] - 0.5, corner[t][1] - 0.5), tile, tile
          )
          for t in tokens
        ],
        facecolor="none",
        edgecolor=colour,
        linewidth=0.9,
      )
    )
  axes.set_axis_off()
  return figures.png(figure)


def _mass(arrays, row: int) -> bytes:
  mass, kept = arrays["mass"], arrays["kept"]
  figure = figures.new_figure(7.5, 6.4)
  axes = figure.subplots()
  image = axes.imshow(
    np.maximum(mass, 1e-4),
    norm=matplotlib.colors.LogNorm(1e-4, 1.0),
    cmap="YlGnBu",
    aspect="equal",
  )
  axes.add_collection(
    matplotlib.collections.LineCollection(
      figures.outline(kept), colors=_ASKING, linewidths=0.7
    )
  )
  held = (mass * kept).sum(1).mean()
  axes.set_title(
    f"{kept.mean():.0%} of the blocks, {held:.1%} of the mass", fontsize=10
  )
  axes.axhline(row, color="#59636e", linewidth=0.6, linestyle=":")
  axes.set(xlabel="block of keys", ylabel="block of queries")
  figure.colorbar(image, ax=axes, shrink=0.7, label="softmax mass of the block")
  return figures.png(figure)
