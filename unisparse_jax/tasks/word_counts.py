# SPDX-License-Identifier: Apache-2.0
"""Aggregation: common words (`cwe`) and frequent coded words (`fwe`) of RULER.

Source: Hsieh et al., 2024, RULER, section 3 and its generators. Differs from it
in: comment lines, and no solved example before the context.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from unisparse_jax.tasks import base, line_tokens, words

_PER_LINE = 10
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
_CWE_INTRO = (
  "# Below is a numbered list of words. Some words appear more often than "
  "others.\n# Memorize the ones that appear most often.\n"
)
_FWE_INTRO = (
  "# Read the following coded text and track the frequency of each coded word."
  "\n# Find the three most frequent coded words. Ignore the dots.\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords(base.Task):
  """The words that appear more often than the others in a numbered list.

  A training document has 1 to num_common common words, so that there are easy
  ones: with one, no word of the answer has to be left out of what follows.

  Attributes:
    num_common: words asked for.
  """

  num_common: int = 10
  max_new_tokens: int = 120

  def build(self, rng, haystack, tokenizer, budget, *, training):
    del haystack
    num_common = self.num_common
    if training:
      if rng.random() < 0.5:
        num_common = int(rng.integers(1, num_common + 1))
      # Both of RULER's settings and what lies between and below them; common
      # words take at most half of the list.
      most = min(31, budget // (16 * num_common))
      if most < 3:
        raise base.TooSmallError
      common_count = int(rng.integers(min(5, most), most + 1))
      other_count = int(rng.integers(1, max(2, common_count // 4)))
    elif budget + 1 >= 4096:
      common_count, other_count = 30, 3
    else:
      common_count, other_count = 6, 1

    intro = tokenizer.encode(_CWE_INTRO)
    common = _draw_words(rng, num_common, set())
    question = base.Question(
      prompt=(
        f"# What are the {num_common} most common words in the above "
        "list?\n# The most common words are:"
      ),
      answer=f" {' '.join(common)}\n",
      targets=tuple(common),
    )
    room = budget - len(intro)
    room -= base.questions_len(self, tokenizer, [question], training)
    pieces = [tokenizer.encode(f" {word}") for word in common]
    used = _list_len([len(p) for p in pieces] * common_count)
    if used > room:
      raise base.TooSmallError
    # The average item takes at least 6 tokens.
    most = (room - used) // (6 * other_count) + 1
    others = _draw_words(rng, most, set(common))
    other_pieces = [tokenizer.encode(f" {word}") for word in others]
    lengths = [len(p) for p in pieces] * common_count
    num_others = _largest(
      len(others),
      lambda n: (
        _list_len(lengths + [len(p) for p in other_pieces[:n]] * other_count)
        <= room
      ),
    )
    if not training and num_others == 0:
      raise base.TooSmallError
    order = np.concatenate(
      [
        np.repeat(np.arange(num_common), common_count),
        np.repeat(np.arange(num_others) + num_common, other_count),
      ]
    )
    order = rng.permutation(order)
    context = _numbered(tokenizer, pieces + other_pieces[:num_others], order)
    context = np.concatenate([intro, context])
    return base.Episode(
      context=context,
      context_weights=np.full(
        len(context), line_tokens.RANDOM_WEIGHT, np.float32
      ),
      questions=[question],
      metadata={
        "num_others": num_others,
        "common_count": common_count,
        "other_count": other_count,
      },
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWords(base.Task):
  """The three coded words that come next after the dots in frequency.

  The word of rank r appears proportionally to r ** -alpha; rank 1 is dots.

  Attributes:
    alpha: exponent of the frequencies.
  """

  alpha: float = 2.0
  max_new_tokens: int = 50

  def build(self, rng, haystack, tokenizer, budget, *, training):
    del haystack
    letters = int(rng.integers(4, 9)) if training else 6
    vocabulary = max(budget // 50, 8)
    coded = base.distinct(
      lambda: "".join(_LETTERS[rng.integers(26, size=letters)]),
      vocabulary,
    )
    intro = tokenizer.encode(_FWE_INTRO)
    pieces = [tokenizer.encode(f" {word}") for word in ["...", *coded]]
    lengths = np.array([len(piece) for piece in pieces])
    question = base.Question(
      prompt=(
        "# What are the three most frequent coded words in the above text?\n"
        "# The three most frequent coded words are:"
      ),
      answer=f" {' '.join(coded[:3])}\n",
      targets=tuple(coded[:3]),
    )
    room = budget - len(intro)
    room -= base.questions_len(self, tokenizer, [question], training)

    def fits(num_words: int) -> bool:
      counts = self._counts(num_words, len(pieces))
      num_lines = -(-int(counts.sum()) // _PER_LINE)
      return int(counts @ lengths) + 2 * num_lines <= room

    num_words = _largest(max(room, 0), fits)
    counts = self._counts(num_words, len(pieces))
    if not counts[1] > counts[2] > counts[3] > counts[4]:
      raise base.TooSmallError
    order = rng.permutation(np.repeat(np.arange(len(pieces)), counts))
    head, tail = tokenizer.encode("#"), tokenizer.encode("\n")
    parts = [intro]
    for start in range(0, len(order), _PER_LINE):
      parts.append(head)
      parts += [pieces[i] for i in order[start : start + _PER_LINE]]
      parts.append(tail)
    context = np.concatenate(parts)
    return base.Episode(
      context=context,
      context_weights=np.full(
        len(context), line_tokens.RANDOM_WEIGHT, np.float32
      ),
      questions=[question],
      metadata={"counts": counts[:5].tolist(), "vocabulary": vocabulary},
    )

  def _counts(self, num_words: int, num_ranks: int) -> np.ndarray:
    """How often each rank appears in about `num_words` words."""
    shares = np.arange(1, num_ranks + 1, dtype=np.float64) ** -self.alpha
    return np.floor(num_words * shares / shares.sum()).astype(np.int64)


def _draw_words(rng, count: int, taken: set[str]) -> list[str]:
  """Different words; pairs of words once the list is used up."""
  order = rng.permutation(len(words.WORDS))
  drawn = [words.WORDS[i] for i in order if words.WORDS[i] not in taken]
  drawn = drawn[:count]
  seen = set(drawn)
  while len(drawn) < count:
    first, second = rng.integers(len(words.WORDS), size=2)
    pair = f"{words.WORDS[first]}_{words.WORDS[second]}"
    if pair not in seen:
      seen.add(pair)
      drawn.append(pair)
  return drawn


def _list_len(word_lengths: list[int]) -> int:
  """Tokens of a numbered list: " ", digits, "." and the word, by lines."""
  count = len(word_lengths)
  digits = sum(
    count - 10**d + 1 for d in range(len(str(max(count, 1)))) if count >= 10**d
  )
  num_lines = -(-count // _PER_LINE)
  return sum(word_lengths) + digits + 2 * count + 2 * num_lines


def _numbered(tokenizer, pieces, order) -> np.ndarray:
  head, tail = tokenizer.encode("#"), tokenizer.encode("\n")
  parts = []
  for i, piece in enumerate(order):
    if i % _PER_LINE == 0:
      parts.append(head)
    parts.append(tokenizer.encode(f" {i + 1}."))
    parts.append(pieces[piece])
    if i % _PER_LINE == _PER_LINE - 1 or i == len(order) - 1:
      parts.append(tail)
  return np.concatenate(parts)


def _largest(most: int, fits) -> int:
  """Largest n in [0, most] with fits(n), which must be monotone."""
  low, high = 0, most
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
  return low
