# SPDX-License-Identifier: Apache-2.0
"""Answers of a model to task prompts, with any attention in the prefill."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pallas_kernels import checks
from unisparse_jax import attention, models, tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """One answered prompt.

  Attributes:
    score: in [0, 1], see `tasks.score`.
    text: what the model wrote.
    targets: what a right answer contains.
  """

  score: float
  text: str
  targets: tuple[str, ...]


def answer(
  model: models.Decoder,
  samples: Sequence[tasks.TaskSample],
  decode_text: Callable[[np.ndarray], str],
  *,
  attention_fn: attention.AttentionFn,
  prompt_len: int,
  batch_size: int = 1,
  stop_ids: Sequence[int] = (),
  max_new_tokens: int | None = None,
) -> list[Answer]:
  """Greedy answers, dense decoding after a prefill with `attention_fn`.

  Prompts are padded to `prompt_len`, so that one compiled prefill serves all.

  Args:
    model: a decoder.
    samples: prompts of one task.
    decode_text: tokens to text.
    attention_fn: how the prefill attends.
    prompt_len: length that every prompt is padded to.
    batch_size: prompts run together.
    stop_ids: tokens that end an answer.
    max_new_tokens: length that decoding is compiled for; default that of the
      samples. An answer is cut at its sample's own budget.

  Returns:
    One answer a sample, in order.

  Raises:
    ValueError: a prompt is longer than prompt_len, or the model's limit is.
  """
  checks.check_positive_int("batch_size", batch_size)
  for sample in samples:
    checks.require(
      len(sample.prompt_tokens) <= prompt_len,
      "prompt_len",
      f"hold every prompt of {sample.task}",
      prompt_len,
      f">= {len(sample.prompt_tokens)}",
    )
  if max_new_tokens is None:
    max_new_tokens = max((s.max_new_tokens for s in samples), default=1)
  answers = []
  for start in range(0, len(samples), batch_size):
    batch = list(samples[start : start + batch_size])
    # The last batch is filled up: a new shape would compile again.
    rows = batch + [batch[-1]] * (batch_size - len(batch))
    tokens, lengths = pad_prompts(rows, prompt_len)
    new_tokens = np.asarray(
      models.generate(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        attention_fn=attention_fn,
        eos_id=tuple(stop_ids) or None,
        lengths=lengths,
      )
    )
    answers += score_tokens(batch, new_tokens, decode_text)
  return answers


def score_tokens(
  samples: Sequence[tasks.TaskSample],
  new_tokens: np.ndarray,
  decode_text: Callable[[np.ndarray], str],
) -> list[Answer]:
  """Scores what was generated after each prompt.

  Args:
    samples: the prompts.
    new_tokens: int [at least num_samples, max_new_tokens], row by row; an
      answer is cut at its sample's own budget.
    decode_text: tokens to text.
  """
  answers = []
  for sample, row in zip(samples, new_tokens, strict=False):
    text = decode_text(row[: sample.max_new_tokens])
    answers.append(
      Answer(score=tasks.score(text, sample), text=text, targets=sample.targets)
    )
  return answers


def pad_prompts(
  samples: Sequence[tasks.TaskSample], prompt_len: int
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as the rows of one array, padded on the right.

  Args:
    samples: prompts of at most prompt_len tokens.
    prompt_len: length of a row.

  Returns:
    int32 [num_samples, prompt_len] and the int32 [num_samples] lengths.
  """
  tokens = np.zeros((len(samples), prompt_len), np.int32)
  lengths = np.asarray([len(s.prompt_tokens) for s in samples], np.int32)
  for row, length, sample in zip(tokens, lengths, samples, strict=True):
    row[:length] = sample.prompt_tokens
  return tokens, lengths
