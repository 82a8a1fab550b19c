# SPDX-License-Identifier: Apache-2.0
"""Needle in a haystack: the eight `niah_*` tasks of RULER.

A needle is a comment line that states the special value of a key; the haystack
is one trivial line repeated, real code, or other needles.

Source: Hsieh et al., 2024, RULER, section 3 and its generators. Differs from it
in: comment lines as needles, code as essays, and an answer to several keys
names each key before its value.
"""

from __future__ import annotations

import dataclasses
import uuid

import numpy as np

from unisparse_jax.tasks import base, line_tokens, words

NOISE = (
  "# The grass is green. The sky is blue. The sun is yellow. Here we go. "
  "There and back again.\n"
)
_EVALUATION_DIGITS = 7
_MAX_TRAINING_KEYS = 96
_LINE_LEN = {"number": 27, "word": 27, "uuid": 55}  # tokens, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleTask(base.Task):
  """One of the `niah_*` tasks.

  Attributes:
    haystack_kind: "noise", "code" or "needles".
    value_kind: "number" or "uuid".
    uuid_keys: keys are UUIDs instead of adjective-noun pairs.
    num_keys: keys in the context (ignored where needles are the haystack).
    num_values: values per key.
    num_queries: keys asked for in one question.
  """

  haystack_kind: str
  value_kind: str = "number"
  uuid_keys: bool = False
  num_keys: int = 1
  num_values: int = 1
  num_queries: int = 1

  def build(self, rng, haystack, tokenizer, budget, *, training):
    kind = self.value_kind
    if training and kind == "number" and rng.random() < 0.15:
      kind = "word"
    if training:
      digits = int(rng.integers(4, 9))
      # Needles may take a third of the context.
      line_len = _LINE_LEN[kind] + 30 * self.uuid_keys
      most = budget // (3 * line_len * self.num_values)
      most = max(2, min(_MAX_TRAINING_KEYS, most))
      num_keys = max(base.many(rng, most), self.num_queries)
    else:
      digits = _EVALUATION_DIGITS
      num_keys = self.num_keys
    draw_value = _value_drawer(rng, kind, digits)
    draw_key = _key_drawer(rng, self.uuid_keys)

    keys = base.distinct(draw_key, num_keys)
    counts = self._values_per_key(rng, num_keys, training)
    values = base.distinct(draw_value, sum(counts))
    pairs = []  # (key, value), in the order of the text
    owners = np.repeat(np.arange(num_keys), counts)
    for owner, value in zip(rng.permutation(owners), values, strict=True):
      pairs.append((keys[owner], value))

    plural = len(pairs) > 1 or self.haystack_kind == "needles"
    intro = tokenizer.encode(_instruction(kind, plural))
    questions = self._questions(rng, pairs, kind, training)
    questions = base.fit_questions(
      tokenizer, questions if training else questions[:1], int(0.4 * budget)
    )
    needles = line_tokens.encode_lines(
      tokenizer,
      [_needle(kind, *pair) for pair in pairs],
      line_tokens.RANDOM_WEIGHT,
    )
    room = budget - len(intro) - len(needles.tokens)
    room -= base.questions_len(self, tokenizer, questions, training)
    filler = self._filler(
      rng, haystack, tokenizer, room, draw_key, draw_value, kind, pairs
    )
    positions = self._positions(rng, len(filler), len(pairs), training)
    tokens, weights = line_tokens.interleave(filler, needles, positions)
    return base.Episode(
      context=np.concatenate([intro, tokens]),
      context_weights=np.concatenate(
        [np.full(len(intro), line_tokens.RANDOM_WEIGHT, np.float32), weights]
      ),
      questions=questions,
      metadata={
        "keys": keys,
        "depths": (positions / max(len(filler), 1)).tolist(),
      },
    )

  def _values_per_key(self, rng, num_keys, training) -> list[int]:
    if self.num_values == 1:
      return [1] * num_keys
    if not training:
      return [self.num_values] * num_keys
    # The first key is asked first and has the number of the evaluation.
    others = rng.integers(1, self.num_values + 2, num_keys - 1).tolist()
    return [self.num_values, *others]

  def _questions(self, rng, pairs, kind, training) -> list[base.Question]:
    values: dict[str, list[str]] = {}
    for key, value in pairs:
      values.setdefault(key, []).append(value)
    keys = [list(values)[i] for i in rng.permutation(len(values))]
    if self.num_queries == 1:
      return [
        _question(kind, key, values[key]) for key in keys[: base.MAX_QUESTIONS]
      ]
    questions = []
    while len(questions) < (base.MAX_QUESTIONS // self.num_queries):
      count = self.num_queries
      if training and questions:
        count = int(rng.integers(2, min(len(keys), 6) + 1))
      asked = [keys[i] for i in rng.permutation(len(keys))[:count]]
      questions.append(_joint_question(kind, asked, values))
    return questions

  def _filler(
    self, rng, haystack, tokenizer, room, draw_key, draw_value, kind, pairs
  ) -> line_tokens.Lines:
    if room < 0:
      raise base.TooSmallError
    if self.haystack_kind == "noise":
      return line_tokens.repeat_line(tokenizer.encode(NOISE), room)
    if self.haystack_kind == "code":
      return line_tokens.code_lines(rng, haystack, room)
    taken = {key for key, _ in pairs}
    lines: list[np.ndarray] = []
    while True:
      key = draw_key()
      if key in taken:
        continue
      line = tokenizer.encode(_needle(kind, key, draw_value()))
      if len(line) > room:
        break
      taken.add(key)
      room -= len(line)
      lines.append(line)
    offsets = np.zeros(len(lines) + 1, np.int64)
    np.cumsum([len(line) for line in lines], out=offsets[1:])
    tokens = np.concatenate(lines) if lines else np.zeros(0, np.int32)
    return line_tokens.Lines(
      tokens=tokens, offsets=offsets, weight=line_tokens.RANDOM_WEIGHT
    )

  def _positions(self, rng, num_lines, count, training) -> np.ndarray:
    if not training and self.haystack_kind == "code" and count <= 40:
      depths = rng.choice(np.linspace(0.0, 1.0, 40), count, replace=False)
      return np.sort(np.round(depths * num_lines).astype(np.int64))
    return np.sort(rng.integers(0, num_lines + 1, count))


def _instruction(kind: str, plural: bool) -> str:
  if plural:
    return (
      f"# Some special magic {kind}s are hidden in the following text. "
      f"Memorize them.\n# A question about the {kind}s follows.\n"
    )
  return (
    f"# A special magic {kind} is hidden in the following text. "
    f"Memorize it.\n# A question about the {kind} follows.\n"
  )


def _needle(kind: str, key: str, value: str) -> str:
  return f"# The special magic {kind} for {key} is: {value}\n"


def _question(kind: str, key: str, values: list[str]) -> base.Question:
  if len(values) == 1:
    prompt = (
      f"# What is the special magic {kind} for {key}?\n"
      f"# The special magic {kind} for {key} is:"
    )
  else:
    prompt = (
      f"# What are all the special magic {kind}s for {key}?\n"
      f"# The special magic {kind}s for {key} are:"
    )
  return base.Question(
    prompt=prompt,
    answer=f" {', '.join(values)}\n",
    targets=tuple(values),
    metadata={"asked": (key,)},
  )


def _joint_question(kind, keys, values) -> base.Question:
  listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
  answer = ", ".join(f"{key}: {values[key][0]}" for key in keys)
  return base.Question(
    prompt=(
      f"# What are the special magic {kind}s for {listed}?\n"
      f"# The special magic {kind}s are:"
    ),
    answer=f" {answer}\n",
    targets=tuple(values[key][0] for key in keys),
    metadata={"asked": tuple(keys)},
  )


def _key_drawer(rng, uuid_keys):
  if uuid_keys:
    return lambda: _uuid(rng)

  def draw() -> str:
    adjective = words.ADJECTIVES[int(rng.integers(len(words.ADJECTIVES)))]
    return f"{adjective}-{words.NOUNS[int(rng.integers(len(words.NOUNS)))]}"

  return draw


def _value_drawer(rng, kind, digits):
  if kind == "uuid":
    return lambda: _uuid(rng)
  if kind == "word":
    # Two words, so that there are more of them than any context asks for.
    def draw() -> str:
      first, second = rng.integers(len(words.WORDS), size=2)
      return f"{words.WORDS[first]}_{words.WORDS[second]}"

    return draw
  low = 10 ** (digits - 1)
  return lambda: str(int(rng.integers(low, 10 * low)))


def _uuid(rng) -> str:
  return str(uuid.UUID(bytes=rng.bytes(16), version=4))
