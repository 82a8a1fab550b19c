# SPDX-License-Identifier: Apache-2.0
"""Contexts put together from encoded lines, without going through text.

The tokenizer encodes a text line by line, so lines of a haystack and lines that
are hidden in it can be joined as tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# Loss weights of a training document.
ANSWER_WEIGHT = 10.0
CODE_WEIGHT = 1.0
RANDOM_WEIGHT = 0.1  # needles, filler, questions: not worth predicting

_TRIES = 20


class Tokenizer(Protocol):
  """What a task needs of a tokenizer."""

  bos_id: int
  eos_id: int

  def encode(self, text: str) -> np.ndarray: ...

  def decode(self, ids) -> str: ...


class Haystack(Protocol):
  """What a task needs of a corpus; `data.CodeCorpus` has it."""

  tokens: np.ndarray  # [num_tokens]
  line_offsets: np.ndarray  # [num_lines + 1]
  line_hashes: np.ndarray  # [num_lines]
  file_lines: np.ndarray  # [num_files + 1]
  file_names: list[str]
  facts: np.ndarray

  def line_text(self, line: int) -> str: ...

  def fact(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
  """Encoded lines, one after the other.

  Attributes:
    tokens: int32 [num_tokens].
    offsets: int64 [num_lines + 1], where each line starts.
    weight: loss weight of every token.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  weight: float

  def __len__(self) -> int:
    return len(self.offsets) - 1


def encode_lines(
  tokenizer: Tokenizer, texts: Sequence[str], weight: float
) -> Lines:
  """Encodes lines, each with its newline."""
  encoded = [tokenizer.encode(text) for text in texts]
  offsets = np.zeros(len(encoded) + 1, np.int64)
  np.cumsum([len(tokens) for tokens in encoded], out=offsets[1:])
  tokens = np.concatenate(encoded) if encoded else np.zeros(0, np.int32)
  return Lines(tokens=tokens, offsets=offsets, weight=weight)


def repeat_line(line: np.ndarray, room: int) -> Lines:
  """As many copies of one encoded line as fit into `room` tokens."""
  count = max(room, 0) // len(line)
  return Lines(
    tokens=np.tile(line, count).astype(np.int32),
    offsets=np.arange(count + 1, dtype=np.int64) * len(line),
    weight=RANDOM_WEIGHT,
  )


def code_lines(
  rng: np.random.Generator, haystack: Haystack, room: int
) -> Lines:
  """Whole lines of code, contiguous, `room` tokens less a line at most.

  Text starts at a random line and wraps round the end of the corpus; where a
  long line leaves a gap of more than 2%, lines from elsewhere close it.
  """
  offsets = haystack.line_offsets
  num_lines = len(offsets) - 1
  tokens = [np.zeros(0, np.int32)]
  ends = [np.zeros(1, np.int64)]
  used = 0
  for _ in range(_TRIES):
    if room - used < max(16, room // 50):
      break
    first = int(rng.integers(num_lines))
    while True:
      start = int(offsets[first])
      last = int(np.searchsorted(offsets, start + room - used, "right")) - 1
      if last > first:
        tokens.append(haystack.tokens[start : offsets[last]].astype(np.int32))
        ends.append(np.asarray(offsets[first + 1 : last + 1]) - start + used)
        used = int(ends[-1][-1])
      if last < num_lines or last == first:
        break
      first = 0
  return Lines(
    tokens=np.concatenate(tokens),
    offsets=np.concatenate(ends),
    weight=CODE_WEIGHT,
  )


def interleave(
  base: Lines, inserted: Lines, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Puts lines between lines.

  Args:
    base: the haystack.
    inserted: lines to put in, in the order in which they shall stand where
      positions are equal.
    positions: [len(inserted)], number of base lines before each.

  Returns:
    Tokens int32 and loss weights float32, all lines of both.
  """
  keys = np.concatenate([positions, np.arange(len(base))])
  order = np.argsort(keys, kind="stable")
  tokens = np.concatenate([inserted.tokens, base.tokens])
  offsets = np.concatenate(
    [inserted.offsets[:-1], base.offsets + len(inserted.tokens)]
  )
  index = take_ragged(offsets, order)
  weights = np.where(index < len(inserted.tokens), inserted.weight, base.weight)
  return tokens[index], weights.astype(np.float32)


def take_ragged(offsets: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Token indices of pieces laid out in a new order.

  Args:
    offsets: [num_pieces + 1], where each piece starts.
    order: [n], pieces to take.

  Returns:
    int64 [total length of the pieces taken].
  """
  lengths = (offsets[1:] - offsets[:-1])[order]
  ends = np.cumsum(lengths)
  total = int(ends[-1]) if len(ends) else 0
  starts = offsets[:-1][order]
  return np.repeat(starts - ends + lengths, lengths) + np.arange(total)
