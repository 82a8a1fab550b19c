# SPDX-License-Identifier: Apache-2.0
"""Lines of tokens on literal arrays."""

import numpy as np

from unisparse_jax.tasks import line_tokens


def _lines(rows, weight):
  offsets = np.cumsum([0] + [len(row) for row in rows])
  return line_tokens.Lines(
    tokens=np.array([t for row in rows for t in row], np.int32),
    offsets=offsets,
    weight=weight,
  )


def test_interleave():
  base = _lines([[1, 1], [2], [3, 3, 3]], 1.0)
  inserted = _lines([[7], [8, 8], [9]], 0.5)
  tokens, weights = line_tokens.interleave(base, inserted, np.array([1, 3, 1]))
  assert tokens.tolist() == [1, 1, 7, 9, 2, 3, 3, 3, 8, 8]
  assert weights.tolist() == [1, 1, 0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5]
  assert weights.dtype == np.float32


def test_interleave_with_nothing():
  nothing = _lines([], 0.5)
  base = _lines([[1], [2]], 1.0)
  tokens, _ = line_tokens.interleave(base, nothing, np.zeros(0, np.int64))
  assert tokens.tolist() == [1, 2]
  tokens, _ = line_tokens.interleave(nothing, base, np.zeros(2, np.int64))
  assert tokens.tolist() == [1, 2]


def test_take_ragged():
  offsets = np.array([0, 2, 2, 5])
  assert line_tokens.take_ragged(offsets, np.array([2, 0, 1, 0])).tolist() == [
    *[2, 3, 4, 0, 1, 0, 1]
  ]
  assert line_tokens.take_ragged(offsets, np.zeros(0, np.int64)).tolist() == []


def test_code_lines_are_whole_and_within_room(held_out_corpus):
  rng = np.random.default_rng(0)
  for room in (0, 5, 40, 300, 5000):
    lines = line_tokens.code_lines(rng, held_out_corpus, room)
    assert len(lines.tokens) <= room
    assert lines.offsets[0] == 0 and lines.offsets[-1] == len(lines.tokens)
    if room >= 300:
      assert len(lines.tokens) > 0.9 * room
    for start, stop in zip(lines.offsets, lines.offsets[1:], strict=False):
      text = held_out_corpus.tokenizer.decode(lines.tokens[start:stop])
      assert text.endswith("\n") and text.strip("\n")
