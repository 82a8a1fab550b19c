# SPDX-License-Identifier: Apache-2.0
"""Training rows: code and task documents, packed, by random access.

Row `index` depends on the seed, the index and the settings alone, so a run can
stop and go on anywhere, and any number of reader processes give the same rows.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from unisparse_jax import tasks
from unisparse_jax.data import code_corpus, domains
from unisparse_jax.tasks import line_tokens

_MIN_TASK_LEN = 256
_MIN_ROW_LEN = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """How often a document is plain code or comes from a task.

  Weights need not sum to 1.

  Attributes:
    code: weight of plain code; the other weights are named like their tasks.
    docs: weight of documentation; see `domains`, for the next two as well.
    word_problems: weight of arithmetic word problems.
    tables: weight of tables in two notations.
    full_row: chance that a document may take all that is left of its row; else
      its length is drawn, each scale alike.
    stdlib: chance that plain code starts in the standard library rather than
      anywhere in the corpus.
    answer_weight: loss weight of the tokens of an answer; code has 1.
  """

  code: float = 6.0
  niah_single_1: float = 0.4
  niah_single_2: float = 0.5
  niah_single_3: float = 0.6
  niah_multikey_1: float = 1.0
  niah_multikey_2: float = 1.4
  niah_multikey_3: float = 1.4
  niah_multivalue: float = 0.9
  niah_multiquery: float = 0.9
  vt: float = 1.6
  cwe: float = 0.9
  fwe: float = 0.8
  qa_1: float = 1.0
  qa_2: float = 1.2
  docs: float = 0.0
  word_problems: float = 0.0
  tables: float = 0.0
  full_row: float = 0.5
  stdlib: float = 0.2
  answer_weight: float = line_tokens.ANSWER_WEIGHT

  def __post_init__(self):
    answer = {"answer_weight": self.answer_weight}
    for name, weight in (self.weights() | answer).items():
      if not (math.isfinite(weight) and weight >= 0.0):
        raise ValueError(
          f"{name} must be a finite number >= 0; got {name}={weight}."
        )
    if sum(self.weights().values()) <= 0.0:
      raise ValueError("weights must not all be 0; got only zeros.")
    for name in ("full_row", "stdlib"):
      chance = getattr(self, name)
      if not 0.0 <= chance <= 1.0:
        raise ValueError(f"{name} must be in [0, 1]; got {name}={chance}.")

  def weights(self) -> dict[str, float]:
    """Weight of "code", of each task and of each kind of text."""
    names = ("code", *tasks.TASKS, *domains.TEXTS)
    return {name: getattr(self, name) for name in names}


class TrainingRows:
  """Rows of tokens and loss weights; a grain RandomAccessDataSource.

  rows[index] is {"tokens": int32 [seq_len + 1],
  "loss_weights": float32 [seq_len + 1]}, where loss_weights[i] weighs the
  prediction of tokens[i]. Documents begin with <bos>, whose weight is 0.
  """

  def __init__(
    self,
    corpus: code_corpus.CodeCorpus,
    seed: int,
    seq_len: int,
    mixture: Mixture | None = None,
    *,
    num_rows: int = 2**31 - 1,
  ):
    """Opens the rows.

    Args:
      corpus: code to train on, with its tokenizer.
      seed: non-negative; another seed gives other rows.
      seq_len: tokens that are predicted in a row.
      mixture: shares of code and tasks; default `Mixture()`.
      num_rows: length that the source reports.
    """
    if seed < 0:
      raise ValueError(f"seed must be >= 0; got seed={seed}.")
    if seq_len < _MIN_ROW_LEN:
      raise ValueError(
        f"seq_len must be at least {_MIN_ROW_LEN}; got seq_len={seq_len}."
      )
    if num_rows < 1:
      raise ValueError(f"num_rows must be at least 1; got num_rows={num_rows}.")
    self.corpus = corpus
    self.seed = seed
    self.seq_len = seq_len
    self.mixture = Mixture() if mixture is None else mixture
    self.num_rows = num_rows
    weights = self.mixture.weights()
    self._kinds = list(weights)
    self._shares = np.array(list(weights.values())) / sum(weights.values())

  def __len__(self) -> int:
    return self.num_rows

  def __repr__(self) -> str:
    # grain stores this to check that a checkpoint belongs to its source.
    return (
      f"TrainingRows(corpus={str(self.corpus.path)!r}, "
      f"split={self.corpus.split!r}, seed={self.seed}, "
      f"seq_len={self.seq_len}, mixture={self.mixture})"
    )

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    index = int(index)
    if not 0 <= index < self.num_rows:
      raise IndexError(
        f"index must be in [0, {self.num_rows}); got index={index}."
      )
    rng = np.random.default_rng([self.seed, index])
    size = self.seq_len + 1
    tokens = np.empty(size, np.int32)
    weights = np.empty(size, np.float32)
    used = 0
    while used < size:
      left = size - used
      document, document_weights = self._document(rng, left)
      stop = used + len(document)
      tokens[used:stop] = document
      weights[used:stop] = document_weights
      used = stop
    return {"tokens": tokens, "loss_weights": weights}

  def _document(self, rng, left: int) -> tuple[np.ndarray, np.ndarray]:
    """A document of at most `left` tokens, not empty."""
    kind = self._kinds[int(rng.choice(len(self._kinds), p=self._shares))]
    length = left
    if left > _MIN_TASK_LEN and rng.random() >= self.mixture.full_row:
      length = int(np.exp(rng.uniform(math.log(_MIN_TASK_LEN), math.log(left))))
    if kind in domains.TEXTS and length > 2:
      return self._text(kind, rng, length)
    if kind in tasks.TASKS and length >= _MIN_TASK_LEN:
      made = tasks.TASKS[kind].document(
        rng,
        self.corpus,
        self.corpus.tokenizer,
        length,
        answer_weight=self.mixture.answer_weight,
      )
      if made is not None:
        return made
    return self._code(rng, length)

  def _text(self, kind, rng, length: int) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = self.corpus.tokenizer
    body = domains.text(kind, rng, self.corpus, length - 2)
    tokens = np.concatenate([[tokenizer.bos_id], body, [tokenizer.eos_id]])
    weights = np.ones(len(tokens), np.float32)
    weights[0] = 0.0
    return tokens.astype(np.int32), weights

  def _code(self, rng, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Contiguous code from a random line on, neighbouring files after it."""
    corpus = self.corpus
    bos, eos = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
    num_lines = corpus.num_lines
    if corpus.num_stdlib_files and rng.random() < self.mixture.stdlib:
      num_lines = int(corpus.file_lines[corpus.num_stdlib_files])
    line = int(rng.integers(num_lines))
    file = int(np.searchsorted(corpus.file_lines, line, "right")) - 1
    if rng.random() < 0.5:
      line = int(corpus.file_lines[file])  # from the file's first line
    parts, used = [], 0
    while used < length:
      start = corpus.line_offsets[line]
      stop = corpus.line_offsets[corpus.file_lines[file + 1]]
      part = np.concatenate([[bos], corpus.tokens[start:stop], [eos]])
      parts.append(part[: length - used])
      used += len(parts[-1])
      file = (file + 1) % corpus.num_files
      line = int(corpus.file_lines[file])
    tokens = np.concatenate(parts).astype(np.int32)
    weights = np.where(tokens == bos, 0.0, 1.0).astype(np.float32)
    return tokens, weights
