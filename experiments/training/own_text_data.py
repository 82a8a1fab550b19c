# SPDX-License-Identifier: Apache-2.0
"""Prompts of the five domains, and what a target writes after them."""

import concurrent.futures
import dataclasses
import logging
import multiprocessing
import os
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np

from pallas_kernels import checks
from unisparse_jax import attention, data, models, training
from unisparse_jax.data import domains

_LOG = logging.getLogger(__name__)
_CHUNK = 16  # prompts made by one call of a worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig:
  """Texts of one shape.

  Attributes:
    name: of the group.
    domains: names in `data.domains.DOMAINS`, taken in turn.
    rows: texts; whole batches are written.
    batch_size: texts written together.
    min_prompt_len: tokens of the shortest prompt.
    prompt_len: tokens of the longest.
    new_tokens: most tokens that the target writes.
    time_share: of the budget, against the other groups.
  """

  name: str
  domains: tuple[str, ...]
  rows: int
  batch_size: int
  min_prompt_len: int
  prompt_len: int
  new_tokens: int
  time_share: float = 1.0

  def __post_init__(self):
    checks.require(
      self.time_share > 0, "time_share", "be above 0", self.time_share
    )
    for field in ("rows", "batch_size", "min_prompt_len", "new_tokens"):
      checks.check_positive_int(field, getattr(self, field))
    checks.require(
      self.prompt_len >= self.min_prompt_len,
      "prompt_len",
      "be at least min_prompt_len",
      self.prompt_len,
    )
    for domain in self.domains:
      checks.check_choice("domains", domain, domains.DOMAINS)


def make_prompts(
  corpus: data.CodeCorpus,
  names: Sequence[str],
  lengths: Sequence[int],
  seed: int,
  *,
  num_processes: int | None = None,
) -> list[np.ndarray]:
  """Prompts, the same whatever the number of processes.

  Args:
    corpus: a split of a cache.
    names: domain of each prompt.
    lengths: tokens of each, see `domains.prompt`.
    seed: of all of them.
    num_processes: default one per CPU but one; 1 stays in process.
  """
  chunks = [
    (
      corpus,
      seed,
      start,
      list(names[start : start + _CHUNK]),
      [int(n) for n in lengths[start : start + _CHUNK]],
    )
    for start in range(0, len(names), _CHUNK)
  ]
  if num_processes is None:
    num_processes = max(1, len(os.sched_getaffinity(0)) - 1)
  if num_processes == 1 or len(chunks) < 4:
    made = map(_make_chunk, chunks)
    return [prompt for chunk in made for prompt in chunk]
  with concurrent.futures.ProcessPoolExecutor(
    min(num_processes, len(chunks)),
    mp_context=multiprocessing.get_context("spawn"),
  ) as pool:
    return [
      prompt for chunk in pool.map(_make_chunk, chunks) for prompt in chunk
    ]


def _make_chunk(chunk) -> list[np.ndarray]:
  corpus, seed, start, names, lengths = chunk
  return [
    domains.prompt(name, np.random.default_rng([seed, start + i]), corpus, n)
    for i, (name, n) in enumerate(zip(names, lengths, strict=True))
  ]


def write_groups(
  configs: Sequence[GroupConfig],
  target: models.Decoder,
  corpus: data.CodeCorpus,
  folder: pathlib.Path,
  *,
  seed: int,
  temperatures: Sequence[float],
  max_seconds: float | None,
  num_processes: int | None,
  attention_fn: attention.AttentionFn,
) -> dict[str, training.TextGroup]:
  """Lets the target write, group by group, and saves each group when written.

  Each group gets its share of the time; one that runs out of it is shorter.
  Groups that are there already are kept.

  Args:
    configs: what to write.
    target: the decoder.
    corpus: where prompts come from; the training split.
    folder: for the texts.
    seed: of prompts and draws.
    temperatures: taken in turn by the rows.
    max_seconds: for all of them; every group writes one batch at least.
    num_processes: that make prompts.
    attention_fn: of the prefill.
  """
  if (folder / "about.json").exists():
    return training.load_groups(folder)
  folder.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  groups = {}
  for number, config in enumerate(configs):
    file = folder / f"{config.name}.npz"
    if file.exists():
      groups[config.name] = training.TextGroup.load(file)
      continue
    until = None
    if max_seconds is not None:
      shares = np.cumsum([c.time_share for c in configs])
      until = start + max_seconds * float(shares[number] / shares[-1])
    group = _write_group(
      config,
      target,
      corpus,
      [seed, number],
      temperatures,
      until,
      num_processes,
      attention_fn,
    )
    group.save(file)
    groups[config.name] = group
    _LOG.info(
      "%s: %d texts, %d tokens written by the target",
      config.name,
      group.num_rows,
      group.num_written,
    )
  about = {"seed": seed, "temperatures": list(temperatures)}
  training.save_groups({}, folder, about | {"names": list(groups)})
  return groups


def _write_group(
  config, target, corpus, seed, temperatures, until, num_processes, attention_fn
) -> training.TextGroup:
  rng = np.random.default_rng(seed)
  num_batches = -(-config.rows // config.batch_size)
  rows = num_batches * config.batch_size
  labels = np.array(
    [domains.DOMAINS.index(n) for n in config.domains], np.int32
  )
  labels = np.resize(labels, rows)
  lengths = rng.integers(config.min_prompt_len, config.prompt_len + 1, rows)
  key = jax.random.key(int(rng.integers(2**31)))
  begin = time.monotonic()
  prompts = make_prompts(
    corpus,
    [domains.DOMAINS[label] for label in labels],
    lengths,
    int(rng.integers(2**31)),
    num_processes=num_processes,
  )
  _LOG.info(
    "%s: %d prompts in %.1f s", config.name, rows, time.monotonic() - begin
  )
  # Not in step with the domains, so each domain gets every temperature.
  heat = rng.permutation(np.resize(np.asarray(temperatures, np.float32), rows))
  parts = []
  for batch in range(num_batches):
    if parts and until is not None and time.monotonic() > until:
      break
    taken = slice(batch * config.batch_size, (batch + 1) * config.batch_size)
    begin = time.monotonic()
    parts.append(
      training.write_texts(
        target,
        prompts[taken],
        prompt_len=config.prompt_len,
        new_tokens=config.new_tokens,
        temperatures=heat[taken],
        rng_key=jax.random.fold_in(key, batch),
        eos_id=corpus.tokenizer.eos_id,
        attention_fn=attention_fn,
      )
    )
    if batch < 3:
      seconds = time.monotonic() - begin
      _LOG.info("%s: batch %d in %.1f s", config.name, batch, seconds)
  tokens, starts, ends = (np.concatenate(x) for x in zip(*parts, strict=True))
  kept = ends > starts
  return training.TextGroup(
    tokens=tokens[kept].astype(np.uint16),
    starts=starts[kept],
    ends=ends[kept],
    labels=labels[: len(tokens)][kept],
  )
