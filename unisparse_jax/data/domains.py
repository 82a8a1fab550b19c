# SPDX-License-Identifier: Apache-2.0
"""Five kinds of text that differ in how predictable they are.

Code, documentation, word problems, tables, and questions about a long context;
each as training text and as prompts that a model continues.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import types
from collections.abc import Callable, Mapping

import numpy as np

from unisparse_jax import tasks
from unisparse_jax.data import code_corpus, docs_text, generated_text

# What `text` writes, beside plain code and the tasks.
TEXTS = ("docs", "word_problems", "tables")
DOMAINS = ("code", *TEXTS, "long_context")
# Tasks that "long_context" asks in turn: long answers, or many of them.
LONG_CONTEXT_TASKS = (
  "qa_1",
  "qa_2",
  "niah_multivalue",
  "niah_multikey_2",
  "vt",
)
_TRIES = 50
_DOCS, _DOCS_OFFSETS = "docs.npy", "docs_offsets.npy"
_MAX_DOCS_FILE = 30_000  # tokens; longer files take most of the time


def text(
  kind: str,
  rng: np.random.Generator,
  corpus: code_corpus.CodeCorpus,
  num_tokens: int,
) -> np.ndarray:
  """Encoded text of one kind.

  Args:
    kind: one of TEXTS.
    rng: source of all choices.
    corpus: what "docs" are taken from, and the tokenizer.
    num_tokens: how many are wanted.

  Returns:
    int32 [num_tokens], without special tokens.
  """
  if kind not in TEXTS:
    raise ValueError(f"kind must be one of {TEXTS}; got kind={kind!r}.")
  if kind == "docs":
    prepared = _prepared_docs(rng, corpus, num_tokens)
    if prepared is not None:
      return prepared
  write = _WRITERS[kind]
  parts, used = [], 0
  while used < num_tokens:
    part = corpus.tokenizer.encode(write(rng, corpus))[: num_tokens - used]
    parts.append(part)
    used += len(part)
  return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def prompt(
  domain: str,
  rng: np.random.Generator,
  corpus: code_corpus.CodeCorpus,
  num_tokens: int,
) -> np.ndarray:
  """A prompt to be continued, cut at any token, or where an answer begins.

  Args:
    domain: one of DOMAINS.
    rng: source of all choices.
    corpus: a split; prompts of the held-out one were never trained on.
    num_tokens: of the prompt, <bos> included; at least 2. A prompt of
      "long_context" may be shorter.

  Returns:
    int32 [num_tokens], or at most that many for "long_context".

  Raises:
    ValueError: an unknown domain; too few tokens for it.
  """
  if domain not in DOMAINS:
    raise ValueError(f"domain must be one of {DOMAINS}; got domain={domain!r}.")
  if num_tokens < 2:
    raise ValueError(
      f"num_tokens must be at least 2; got num_tokens={num_tokens}."
    )
  if domain == "long_context":
    return _question(rng, corpus, num_tokens)
  bos = np.array([corpus.tokenizer.bos_id], np.int32)
  if domain == "code":
    body = _code(rng, corpus, num_tokens - 1)
  else:
    body = text(domain, rng, corpus, num_tokens - 1)
  return np.concatenate([bos, body])


def _code(rng, corpus, num_tokens: int) -> np.ndarray:
  """Code from a line on after which the file goes on long enough."""
  start = 0
  for _ in range(_TRIES):
    line = int(rng.integers(corpus.num_lines))
    file = int(np.searchsorted(corpus.file_lines, line, "right")) - 1
    start = int(corpus.line_offsets[line])
    end = int(corpus.line_offsets[corpus.file_lines[file + 1]])
    if end - start >= 2 * num_tokens:
      break
  start = min(start, max(corpus.num_tokens - num_tokens, 0))
  taken = corpus.tokens[start : start + num_tokens].astype(np.int32)
  return np.resize(taken, num_tokens)


def _question(rng, corpus, num_tokens: int) -> np.ndarray:
  """A context and its first questions; the next answer is to be written."""
  for _ in range(_TRIES):
    name = LONG_CONTEXT_TASKS[int(rng.integers(len(LONG_CONTEXT_TASKS)))]
    task = tasks.TASKS[name]
    tokens, weights = task.document(
      rng, corpus, corpus.tokenizer, num_tokens + 64, answer_weight=2.0
    ) or (np.zeros(0, np.int32), np.zeros(0, np.float32))
    first = np.flatnonzero(weights == np.float32(2.0))
    # Answers that begin within the prompt's room; the last such is asked.
    begins = first[np.flatnonzero(np.diff(first, prepend=-2) > 1)]
    begins = begins[(begins <= num_tokens) & (begins >= num_tokens // 2)]
    if len(begins):
      return tokens[: int(begins[0])]
  raise ValueError(
    "num_tokens must be large enough for long_context; got "
    f"num_tokens={num_tokens}; expected at least some 256."
  )


def prepare_docs(
  corpus: code_corpus.CodeCorpus,
  *,
  num_files: int = 5000,
  num_processes: int | None = None,
) -> int:
  """Extracts documentation once, so that `text` need not parse sources.

  Writes `docs.npy` and `docs_offsets.npy` beside the split's other arrays; what
  is there already is kept.

  Args:
    corpus: a split.
    num_files: files that are read, drawn at random; fewer in a small corpus.
    num_processes: default one per CPU; 1 stays in process.

  Returns:
    Tokens of documentation.
  """
  folder = corpus.path / corpus.split
  if (folder / _DOCS_OFFSETS).exists():
    return int(np.load(folder / _DOCS_OFFSETS)[-1])
  order = np.random.default_rng(0).permutation(corpus.num_files)[:num_files]
  chunks = [
    (corpus, files) for files in np.array_split(order, 64) if len(files)
  ]
  if num_processes is None:
    num_processes = len(os.sched_getaffinity(0))
  if num_processes == 1:
    made = list(map(_docs_of, chunks))
  else:
    with concurrent.futures.ProcessPoolExecutor(
      min(num_processes, len(chunks)),
      mp_context=multiprocessing.get_context("spawn"),
    ) as pool:
      made = list(pool.map(_docs_of, chunks))
  documents = [document for chunk in made for document in chunk]
  lengths = [len(document) for document in documents]
  tokens = np.concatenate([*documents, np.zeros(0, np.uint16)])
  np.save(folder / _DOCS, tokens.astype(np.uint16))
  # Written last: its presence means that both are whole.
  temporary = folder / ("tmp." + _DOCS_OFFSETS)
  np.save(temporary, np.cumsum([0, *lengths]).astype(np.int64))
  temporary.replace(folder / _DOCS_OFFSETS)
  return sum(lengths)


def _docs_of(chunk) -> list[np.ndarray]:
  corpus, files = chunk
  found = []
  for file in files:
    start, stop = corpus.line_offsets[corpus.file_lines[file : file + 2]]
    if stop - start > _MAX_DOCS_FILE:
      continue
    text = docs_text.module_docs(
      corpus.file_names[file], corpus.file_text(file)
    )
    if text:
      found.append(corpus.tokenizer.encode(text).astype(np.uint16))
  return found


def _prepared_docs(rng, corpus, num_tokens: int) -> np.ndarray | None:
  """Documentation that `prepare_docs` wrote; None where there is none."""
  loaded = corpus.__dict__.get("_docs")
  if loaded is None:
    folder = corpus.path / corpus.split
    loaded = ()
    if (folder / _DOCS_OFFSETS).exists():
      loaded = (
        np.load(folder / _DOCS, mmap_mode="r"),
        np.load(folder / _DOCS_OFFSETS),
      )
    corpus.__dict__["_docs"] = loaded
  if not loaded or len(loaded[1]) < 2:
    return None
  tokens, offsets = loaded
  start = int(offsets[rng.integers(len(offsets) - 1)])
  taken = np.asarray(tokens[start : start + num_tokens], np.int32)
  while len(taken) < num_tokens:
    taken = np.concatenate([taken, tokens[: num_tokens - len(taken)]])
  return taken.astype(np.int32)


def _docs(rng, corpus) -> str:
  """Documentation of one module of the corpus."""
  for _ in range(_TRIES):
    file = int(rng.integers(corpus.num_files))
    found = docs_text.module_docs(
      corpus.file_names[file], corpus.file_text(file)
    )
    if found:
      return found
  return generated_text.word_problem(rng)  # a corpus without docstrings


def _word_problems(rng, corpus) -> str:
  del corpus
  return generated_text.word_problem(rng)


def _tables(rng, corpus) -> str:
  del corpus
  return generated_text.table(rng)


_WRITERS: Mapping[str, Callable[..., str]] = types.MappingProxyType(
  {"docs": _docs, "word_problems": _word_problems, "tables": _tables}
)
