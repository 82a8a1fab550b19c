# SPDX-License-Identifier: Apache-2.0
"""What every task shares: samples, episodes, scoring.

A task makes two things from one recipe. A `TaskSample` is an evaluation prompt:
one context, one question. An `Episode` is a training document: one context of
random sizes with many questions, written exactly alike, so that its first
question looks like an evaluation.

To look at a sample, print its prompt and targets:

  sample = tasks.TASKS["vt"].sample(rng, corpus, corpus.tokenizer, 2048)
  print(sample.prompt, "|", sample.targets)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unisparse_jax.tasks import line_tokens

MAX_QUESTIONS = 24
_MAX_MIN_LEN = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSample:
  """One evaluation prompt.

  Attributes:
    task: name of the task.
    prompt: text that the model continues.
    prompt_tokens: int32 [prompt_len], <bos> and the encoded prompt.
    targets: what a right answer contains.
    match: "all" scores the fraction of targets found, "part" any of them.
    max_new_tokens: budget of the answer, which is one line.
    metadata: where and what was hidden, for analysis.
  """

  task: str
  prompt: str
  prompt_tokens: np.ndarray
  targets: tuple[str, ...]
  match: str
  max_new_tokens: int
  metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A question, the line the model continues, and its answer.

  `prompt` ends where the answer begins; `answer` begins with a blank or an
  opening bracket and ends with a newline.
  """

  prompt: str
  answer: str
  targets: tuple[str, ...]
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
  """A context and its questions.

  Attributes:
    context: int32 [context_len], without <bos>.
    context_weights: float32 [context_len], loss weights.
    questions: at least one.
    metadata: sizes of the context.
  """

  context: np.ndarray
  context_weights: np.ndarray
  questions: list[Question]
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


class TooSmallError(ValueError):
  """The context does not fit; callers say for which length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """Common half of the 13 tasks; subclasses write `build`.

  Attributes:
    name: RULER's name.
    match: "all" or "part".
    max_new_tokens: budget of the answer.
  """

  name: str
  match: str = "all"
  max_new_tokens: int = 128

  def build(
    self,
    rng: np.random.Generator,
    haystack: line_tokens.Haystack,
    tokenizer: line_tokens.Tokenizer,
    budget: int,
    *,
    training: bool,
  ) -> Episode:
    """Writes one episode.

    Args:
      rng: source of all choices.
      haystack: code text to hide things in.
      tokenizer: encodes the text.
      budget: most tokens of context and questions together. In training the
        answers count too, in evaluation one answer of `max_new_tokens` does.
      training: random sizes and many questions, or RULER's sizes and one.
    """
    raise NotImplementedError

  def sample(
    self,
    rng: np.random.Generator,
    haystack: line_tokens.Haystack,
    tokenizer: line_tokens.Tokenizer,
    max_len: int,
  ) -> TaskSample:
    """Makes an evaluation prompt.

    Args:
      rng: source of all choices.
      haystack: code text to hide things in, such as
        `CodeCorpus(path, "held_out")`.
      tokenizer: the tokenizer of the haystack.
      max_len: most tokens of prompt and answer together.

    Returns:
      A sample with len(prompt_tokens) + max_new_tokens <= max_len.

    Raises:
      ValueError: max_len is too small or the haystack too short.
    """
    try:
      episode = self._build(rng, haystack, tokenizer, max_len, training=False)
    except TooSmallError as error:
      minimum = self._min_len(haystack, tokenizer, max_len)
      raise ValueError(
        f"max_len must be large enough for {self.name}; got max_len={max_len}; "
        f"expected max_len >= {minimum}."
      ) from error
    question = episode.questions[0]
    prompt_tokens = np.concatenate(
      [
        np.array([tokenizer.bos_id], np.int32),
        episode.context,
        tokenizer.encode(question.prompt),
      ]
    )
    assert len(prompt_tokens) + self.max_new_tokens <= max_len, (
      f"{self.name} overran max_len={max_len}"
    )
    return TaskSample(
      task=self.name,
      prompt=tokenizer.decode(prompt_tokens),
      prompt_tokens=prompt_tokens,
      targets=question.targets,
      match=self.match,
      max_new_tokens=self.max_new_tokens,
      metadata=episode.metadata | question.metadata,
    )

  def document(
    self,
    rng: np.random.Generator,
    haystack: line_tokens.Haystack,
    tokenizer: line_tokens.Tokenizer,
    max_len: int,
    *,
    answer_weight: float = line_tokens.ANSWER_WEIGHT,
  ) -> tuple[np.ndarray, np.ndarray] | None:
    """Makes a training document.

    Args:
      rng: source of all choices.
      haystack: code text to hide things in.
      tokenizer: the tokenizer of the haystack.
      max_len: most tokens of the document, <bos> and <eos> included.
      answer_weight: loss weight of the tokens of an answer.

    Returns:
      Tokens int32 [n] and loss weights float32 [n] with n <= max_len; None if
      nothing fits.
    """
    try:
      # One more token than in evaluation: the closing <eos>.
      episode = self._build(
        rng, haystack, tokenizer, max_len - 1, training=True
      )
    except TooSmallError:
      return None
    tokens = [np.array([tokenizer.bos_id], np.int32), episode.context]
    weights = [np.zeros(1, np.float32), episode.context_weights]
    for question in episode.questions:
      for text, weight in (
        (question.prompt, line_tokens.RANDOM_WEIGHT),
        (question.answer, answer_weight),
      ):
        tokens.append(tokenizer.encode(text))
        weights.append(np.full(len(tokens[-1]), weight, np.float32))
    tokens.append(np.array([tokenizer.eos_id], np.int32))
    weights.append(np.full(1, line_tokens.RANDOM_WEIGHT, np.float32))
    result = np.concatenate(tokens)
    assert len(result) <= max_len, f"{self.name} overran max_len={max_len}"
    return result, np.concatenate(weights)

  def _build(self, rng, haystack, tokenizer, max_len, *, training) -> Episode:
    budget = max_len - 1  # <bos>
    if budget <= 0:
      raise TooSmallError
    return self.build(rng, haystack, tokenizer, budget, training=training)

  def _min_len(self, haystack, tokenizer, max_len) -> int:
    """Smallest max_len that works for fixed choices, for the error message."""

    def fits(length: int) -> bool:
      rng = np.random.default_rng(0)
      try:
        self._build(rng, haystack, tokenizer, length, training=False)
      except TooSmallError:
        return False
      return True

    low, high = max_len, max(2 * max_len, 64)
    while not fits(high) and high < _MAX_MIN_LEN:
      low, high = high, 2 * high
    while high - low > 16:
      middle = (low + high) // 2
      low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def score(prediction: str, sample: TaskSample) -> float:
  """Scores an answer as RULER does: case-insensitive substrings.

  An answer is one line, so only the first line of the prediction counts (RULER
  looks at all of it).

  Args:
    prediction: text the model wrote after the prompt.
    sample: the sample it answers.

  Returns:
    In [0, 1]: the fraction of targets found, or 1 if any is ("part").
  """
  line = prediction.split("\n", 1)[0].lower()
  found = [target.lower() in line for target in sample.targets]
  if sample.match == "part":
    return float(any(found))
  return sum(found) / len(found)


def questions_len(
  task: Task,
  tokenizer: line_tokens.Tokenizer,
  questions: Sequence[Question],
  training,
) -> int:
  """Tokens that the questions take out of a budget."""
  total = 0
  for question in questions:
    total += len(tokenizer.encode(question.prompt))
    if training:
      total += len(tokenizer.encode(question.answer))
    else:
      total += task.max_new_tokens
  return total


def fit_questions(
  tokenizer: line_tokens.Tokenizer, questions: Sequence[Question], room: int
) -> list[Question]:
  """First questions that fit into `room` tokens with their answers; >= 1."""
  kept: list[Question] = []
  for question in questions:
    room -= len(tokenizer.encode(question.prompt))
    room -= len(tokenizer.encode(question.answer))
    if kept and room < 0:
      break
    kept.append(question)
  return kept


def log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
  """Integer in [low, high], each scale equally likely."""
  if high <= low:
    return low
  value = np.exp(rng.uniform(np.log(low), np.log(high + 1)))
  return int(np.clip(value, low, high))


def many(rng: np.random.Generator, most: int) -> int:
  """Integer in [1, most]: any scale, or, as often, the upper half."""
  low = 1 if rng.random() < 0.5 else max(1, most // 2)
  return log_uniform(rng, low, most)


def distinct(draw: Callable[[], str], count: int) -> list[str]:
  """Draws until there are `count` different strings; in order of drawing."""
  seen: dict[str, None] = {}
  while len(seen) < count:
    seen[draw()] = None
  return list(seen)
