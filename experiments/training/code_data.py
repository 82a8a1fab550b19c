# SPDX-License-Identifier: Apache-2.0
"""Corpus of a run, and what a model is tried on while it learns."""

import importlib.util
import logging
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from experiments.prefill import long_context_config
from unisparse_jax import data, training
from unisparse_jax.data import sources
from unisparse_jax.data import tokenizer as tokenizer_lib
from unisparse_jax.tasks import TASKS

_LOG = logging.getLogger(__name__)


def prepare_corpus(config: Mapping, vocab_size: int, folder: pathlib.Path):
  """Tokenizer and corpus under `folder`, made where they are missing.

  Or the corpus that the key "cache" names, tokenised on another machine.
  """
  tokenizer_file = folder / "tokenizer.json"
  if not tokenizer_file.exists() and config.get("tokenizer"):
    model = long_context_config.model_folder(config["tokenizer"])
    data.Tokenizer.load(model).save(tokenizer_file)
  if not tokenizer_file.exists():
    _LOG.info("training the tokenizer")
    found = [s for s in sources.find_sources() if not s.held_out]
    texts = (sources.read_source(source.path) for source in found)
    tokenizer_lib.train(
      (text for text in texts if text is not None), vocab_size=vocab_size
    ).save(tokenizer_file)
  tokenizer = data.Tokenizer.load(tokenizer_file)
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      "config.model.vocab_size must hold the tokenizer's entries; got "
      f"vocab_size={vocab_size}, entries={tokenizer.vocab_size}."
    )
  if config.get("cache"):
    cache = pathlib.Path(config["cache"])
    if data.Tokenizer.load(cache / "tokenizer.json").to_json() != (
      tokenizer.to_json()
    ):
      raise ValueError(
        "config.data.cache must be tokenised by the model's tokenizer; got "
        f"cache={config['cache']!r}, whose tokenizer is another one."
      )
    return tokenizer_file, cache
  directories = tuple(config["extra_directories"])
  directories += package_folders(config["packages"])
  corpus = folder / "corpus"
  if not corpus.exists():
    _LOG.info("tokenising the standard library and %s", directories)
    data.build_cache(corpus, tokenizer, extra_directories=directories)
  return tokenizer_file, corpus


def package_folders(names: Iterable[str]) -> tuple[str, ...]:
  """Source folders of those of the named packages that are installed."""
  folders = []
  for name in names:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
      _LOG.warning("no sources of %s: it is not installed", name)
      continue
    folders += spec.submodule_search_locations
  return tuple(folders)


def make_evaluate(config: Mapping, held_out: data.CodeCorpus, attention_fn):
  """Loss by position on held-out code, and answers to tasks in it."""
  code_only = data.Mixture(**dict.fromkeys(TASKS, 0.0), code=1.0, full_row=1.0)
  rows = data.TrainingRows(held_out, 0, config["seq_len"], code_only)
  taken = [rows[i] for i in range(config["rows"])]
  tokens, weights = (
    np.stack([row[name] for row in taken])
    for name in ("tokens", "loss_weights")
  )
  batches = {"batch_size": config["batch_size"], "attention_fn": attention_fn}
  edges = training.position_edges(
    config["seq_len"], first=min(1024, config["seq_len"] // 2)
  )
  entropy = training.unigram_entropy(held_out.tokens)
  task_rows = {
    (name, length): task_documents(name, held_out, length, config["task_rows"])
    for length in config["task_lens"]
    for name in TASKS
  }

  def evaluate(model, step):
    del step
    result = {"unigram_entropy": entropy}
    result |= training.loss_by_position(
      model, tokens, weights, edges=edges, **batches
    )
    for (name, length), documents in task_rows.items():
      scores = training.answer_accuracy(model, *documents, **batches)
      result[f"{name}_{length}"] = scores["exact_match"]
    return result

  return evaluate


def task_documents(name: str, corpus: data.CodeCorpus, length: int, rows: int):
  """Padded documents of one task: tokens and weights [rows, length + 1]."""
  rng = np.random.default_rng([list(TASKS).index(name), length])
  tokens = np.full((rows, length + 1), corpus.tokenizer.pad_id, np.int32)
  weights = np.zeros((rows, length + 1), np.float32)
  made = 0
  while made < rows:
    document = TASKS[name].document(rng, corpus, corpus.tokenizer, length)
    if document is None:
      raise ValueError(
        f"config.eval.task_lens must be long enough for {name}; got {length}."
      )
    tokens[made, : len(document[0])] = document[0]
    weights[made, : len(document[0])] = document[1]
    made += 1
  return tokens, weights
