# SPDX-License-Identifier: Apache-2.0
"""Videos of handwritten digits with questions that take a search to answer.

A frame is a grid of tiles of 8 x 8 pixels; a tile is one token. Each frame has
a wallpaper, a random texture behind all of its tiles, and shows a digit of
scikit-learn's `load_digits` on each. Three questions are asked, all "which
digit?":

  scan     in the frame with this wallpaper (an example is shown), at this row
           and column: the asker must find the frame by its look;
  replay   in the frame at this time, at this row and column, where the frame
           replays another one's wallpaper with every tile empty: whoever
           encodes the video must find the other frame, and the tile in it;
  sticker  at this time, row and column, where an empty tile has a texture of
           its own, which one tile of another frame has as well, with a digit:
           the encoder must find that single tile, wherever it is.

What is sought is anywhere in the video, so a local window cannot answer.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from sklearn import datasets, model_selection

from pallas_kernels import checks

TILE = 8  # pixels a side, that of the digits
KINDS = ("scan", "replay", "sticker")
NUM_DIGITS = 10
_WALLPAPER = 0.4  # brightness of a texture; a digit's stroke has 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig:
  """Sizes of a video and its questions.

  Attributes:
    rows: tiles in a frame's column.
    columns: tiles in a frame's row.
    max_frames: times that a frame may stand at.
    group: questions in a row about one frame (of stickers: about any).
    stickers: tiles with a texture of their own in a frame that has such tiles.
  """

  rows: int = 6
  columns: int = 8
  max_frames: int = 96
  group: int = 16
  stickers: int = 8

  def __post_init__(self):
    for name in ("rows", "columns", "max_frames", "group", "stickers"):
      checks.check_positive_int(name, getattr(self, name))
    for name in ("group", "stickers"):
      size = getattr(self, name)
      checks.require(size <= self.num_tiles, name, "fit a frame", size)

  @property
  def num_tiles(self) -> int:
    """Tokens of a frame."""
    return self.rows * self.columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
  """Images and what they show, of one side of the split.

  Attributes:
    images: float32 [num_images, TILE, TILE], 0 is paper and 1 ink.
    labels: int32 [num_images], 0 to 9.
  """

  images: Float[np.ndarray, "num_images height width"]
  labels: Int[np.ndarray, " num_images"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Videos:
  """A batch of videos with their questions, or one without the batch axis.

  Attributes:
    pixels: float32 [batch, num_tokens, TILE * TILE], frame by frame, a frame
      row by row.
    times: int32 [batch, num_frames], rising, below max_frames.
    examples: float32 [batch, num_questions, TILE * TILE], the wallpaper asked
      for by a "scan", else 0.
    asked_times: int32 [batch, num_questions]; of a "scan" max_frames.
    asked_tiles: int32 [batch, num_questions], row * columns + column.
    kinds: int32 [batch, num_questions], index in `KINDS`.
    answers: int32 [batch, num_questions], 0 to 9.
    tile_answers: int32 [batch, num_tokens], the digit that each tile shows or,
      of an empty one, that is to be found for it. Training asks for these too.
    tile_sources: int32 [batch, num_tokens], the token that shows this digit.
  """

  pixels: Float[np.ndarray, "*batch num_tokens pixels"]
  times: Int[np.ndarray, "*batch num_frames"]
  examples: Float[np.ndarray, "*batch num_questions pixels"]
  asked_times: Int[np.ndarray, "*batch num_questions"]
  asked_tiles: Int[np.ndarray, "*batch num_questions"]
  kinds: Int[np.ndarray, "*batch num_questions"]
  answers: Int[np.ndarray, "*batch num_questions"]
  tile_answers: Int[np.ndarray, "*batch num_tokens"]
  tile_sources: Int[np.ndarray, "*batch num_tokens"]


def split_digits(seed: int = 0) -> tuple[Digits, Digits]:
  """1,347 images to train on and 450 others to test on, by class alike."""
  bunch = datasets.load_digits()
  parts = model_selection.train_test_split(
    bunch.images / 16.0,
    bunch.target,
    test_size=0.25,
    random_state=seed,
    stratify=bunch.target,
  )
  images = [np.asarray(x, np.float32) for x in parts[:2]]
  labels = [np.asarray(x, np.int32) for x in parts[2:]]
  train, test = (
    Digits(images=x, labels=y) for x, y in zip(images, labels, strict=True)
  )
  return train, test


def draw(
  rng: np.random.Generator,
  digits: Digits,
  config: VideoConfig,
  *,
  batch: int,
  num_frames: int,
  num_questions: int,
) -> Videos:
  """A batch of videos.

  A quarter of the frames are replays of another quarter; half of the others
  have stickers to be found, and the rest the empty tiles that ask for them.

  Args:
    rng: of the draw.
    digits: images to show.
    config: sizes.
    batch: videos.
    num_frames: a multiple of 4, at most max_frames.
    num_questions: of each video; a multiple of the group. The kinds take turns
      from group to group.
  """
  checks.check_divides("4", 4, "num_frames", num_frames)
  checks.check_divides("group", config.group, "num_questions", num_questions)
  checks.require(
    4 <= num_frames <= config.max_frames,
    "num_frames",
    "be between 4 and max_frames",
    num_frames,
    f"at most {config.max_frames}",
  )
  videos = [
    _draw_one(rng, digits, config, num_frames, num_questions)
    for _ in range(batch)
  ]
  names = [field.name for field in dataclasses.fields(Videos)]
  return Videos(
    **{name: np.stack([getattr(v, name) for v in videos]) for name in names}
  )


def _draw_one(rng, digits, config, num_frames, num_questions) -> Videos:
  quarter, num_tiles = num_frames // 4, config.num_tiles
  originals, replays, givers, askers = rng.permutation(num_frames).reshape(
    4, quarter
  )
  texture = _textures(rng, num_frames)[:, None]
  texture[replays] = texture[originals]
  texture = np.repeat(texture, num_tiles, axis=1)
  index = rng.integers(len(digits.labels), size=(num_frames, num_tiles))
  labels, ink = digits.labels[index], digits.images[index]
  # (frame, tile) that shows one, that asks for it.
  num_stickers = config.stickers * quarter
  given, wanted = (
    np.divmod(
      rng.choice(quarter * num_tiles, num_stickers, replace=False), num_tiles
    )
    for _ in range(2)
  )
  given, wanted = (givers[given[0]], given[1]), (askers[wanted[0]], wanted[1])
  texture[given] = texture[wanted] = _textures(rng, num_stickers)
  ink[replays] = 0.0
  ink[wanted] = 0.0
  pixels = ink + (1.0 - ink) * texture
  # What is to be answered, tile by tile.
  sources = np.arange(num_frames * num_tiles).reshape(num_frames, -1)
  sources[replays] = sources[originals]
  sources[wanted] = sources[given]
  labels = labels.reshape(-1)[sources]
  times = np.sort(
    rng.choice(config.max_frames, num_frames, replace=False)
  ).astype(np.int32)

  shown = np.ones((num_frames, num_tiles), bool)
  shown[given] = shown[wanted] = False  # a sticker hides the wallpaper
  scanned = np.concatenate([originals, givers, askers])
  frames, tiles, kinds = [], [], []
  # It would always be the same kind that is asked once more.
  first = int(rng.integers(len(KINDS)))
  for group in range(num_questions // config.group):
    kind = (first + group) % len(KINDS)
    if KINDS[kind] == "sticker":
      chosen = rng.choice(
        num_stickers, config.group, replace=num_stickers < config.group
      )
      frames.append(wanted[0][chosen])
      tiles.append(wanted[1][chosen])
    else:
      frame = rng.choice(scanned if KINDS[kind] == "scan" else replays)
      possible = np.flatnonzero(shown[frame])
      tiles.append(
        rng.choice(possible, config.group, replace=len(possible) < config.group)
      )
      frames.append(np.full(config.group, frame))
    kinds.append(np.full(config.group, kind))
  frames, tiles, kinds = (np.concatenate(x) for x in (frames, tiles, kinds))
  is_scan = kinds == KINDS.index("scan")
  wallpaper = np.where(is_scan[:, None, None], texture[frames, tiles], 0.0)
  return Videos(
    pixels=pixels.reshape(num_frames * num_tiles, -1).astype(np.float32),
    times=times,
    examples=wallpaper.reshape(num_questions, -1).astype(np.float32),
    asked_times=np.where(is_scan, config.max_frames, times[frames]).astype(
      np.int32
    ),
    asked_tiles=tiles.astype(np.int32),
    kinds=kinds.astype(np.int32),
    answers=labels[frames, tiles].astype(np.int32),
    tile_answers=labels.reshape(-1).astype(np.int32),
    tile_sources=sources.reshape(-1).astype(np.int32),
  )


def _textures(rng, count) -> np.ndarray:
  """float [count, TILE, TILE], half of the pixels lit."""
  return _WALLPAPER * rng.integers(0, 2, (count, TILE, TILE))
