# SPDX-License-Identifier: Apache-2.0
"""Target, drafters, prompts and one timed call, for all of speculation."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decoding import speculation_config as config_lib
from experiments.prefill import long_context_config
from experiments.training import own_text_data
from unisparse_jax import attention, data, models, speculative
from unisparse_jax.data import domains
from unisparse_jax.speculative import head_files
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative.drafters import base, combined, eagle, lookup

EAGLE = "eagle"
COMBINED = "combined"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """What one batch brought.

  Attributes:
    tokens: int32 [batch, new_tokens].
    seconds: of decoding, prefill apart.
    prefill_seconds: until the first token is there.
    log: `speculative.statistics.StepLog` of NumPy arrays; None for plain
      decoding.
  """

  tokens: np.ndarray
  seconds: float
  prefill_seconds: float
  log: Any


class Setup:
  """Holds the models of a config, loaded when first used."""

  def __init__(
    self, config: config_lib.SpeculationConfig, workdir: pathlib.Path
  ):
    self.config = config
    self.folder = long_context_config.model_folder(config.target)
    self._workdir = workdir
    self._targets: dict[str, models.Flat[models.Decoder]] = {}
    self._prompts: dict[tuple, list[np.ndarray]] = {}
    self._drafters: dict[tuple[str, str], Any] = {}

  @functools.cached_property
  def corpus(self) -> data.CodeCorpus:
    """The held-out split."""
    tokenizer = data.Tokenizer.load(self.folder / "tokenizer.json")
    path = pathlib.Path(self.config.corpus or self._workdir / "corpus")
    if not self.config.corpus:
      data.build_cache(path, tokenizer)
    corpus = data.CodeCorpus(path, "held_out")
    if corpus.tokenizer.to_json() != tokenizer.to_json():
      raise ValueError(
        "config.corpus must be tokenised as the target reads; got "
        f"corpus={self.config.corpus!r}, whose tokenizer is another one."
      )
    return corpus

  def target(self, dtype: str) -> models.Decoder:
    """The decoder."""
    return self._target(dtype).module

  def _target(self, dtype: str) -> models.Flat[models.Decoder]:
    if dtype not in self._targets:
      self._targets[dtype] = models.flat(
        models.load_hf(self.folder, dtype=jnp.dtype(dtype))
      )
    return self._targets[dtype]

  def drafter(self, name: str, dtype: str) -> Any:
    """A drafter by name: "eagle", "ngram", "suffix" or "combined"."""
    if (name, dtype) not in self._drafters:
      self._drafters[name, dtype] = self._make_drafter(name, dtype)
    return self._drafters[name, dtype]

  def _make_drafter(self, name: str, dtype: str) -> Any:
    if name == "ngram":
      return lookup.PromptLookup()
    if name == "suffix":
      return lookup.SuffixMatch()
    if name == COMBINED:
      return combined.LookupFirst(
        lookup=lookup.SuffixMatch(),
        drafter=self.drafter(EAGLE, dtype),
        model_cost=self.config.combined_cost,
        lookup_nodes=self.config.combined_nodes,
        drafter_depth=self.config.shape.max_depth,
      )
    head = head_files.load_head(
      config_lib.head_folder(self.config.head),
      self.target(dtype),
    )
    return eagle.Eagle(head=head)

  @functools.cached_property
  def drafter_hash(self) -> str:
    """Of the head as it drafts where time is measured."""
    return base.fingerprint(self.drafter(EAGLE, self.config.dtype))

  def table(self, depth: int, nodes: int) -> policy_lib.HeteroSpec:
    """A fixed tree as a table, so that it runs what HeteroSpec compiled."""
    shape = self.config.shape
    return policy_lib.HeteroSpec.create(
      thresholds=np.full(7, np.inf),
      depth=[max(depth, 1)] * 8,
      nodes=[max(nodes, 0)] * 8,
      base_depth=shape.base_depth,
      width=shape.width,
      drafter_hash=self.drafter_hash,
    )

  def prompts(
    self, domain: str, *, count: int, use: str, size: int = 0
  ) -> list[np.ndarray]:
    """Prompts of a domain; those for another use are other ones.

    Args:
      domain: of `data.domains.DOMAINS`.
      count: how many; the first ones do not depend on it.
      use: such as "measure" or "calibrate".
      size: tokens; 0: as the config says.
    """
    if not size:
      is_long = domain == "long_context"
      size = self.config.prompt_len if is_long else self.config.short_prompt
    place = (domain, count, use, size)
    if place in self._prompts:
      return self._prompts[place]
    seed = hashlib.sha256(f"{self.config.seed} {use} {domain}".encode())
    made = own_text_data.make_prompts(
      self.corpus,
      [domain] * count,
      [size] * count,
      int.from_bytes(seed.digest()[:4], "little"),
      num_processes=1,
    )
    self._prompts[place] = made
    return made

  def padded(
    self, prompts: list[np.ndarray], size: int = 0
  ) -> tuple[np.ndarray, np.ndarray]:
    """tokens int32 [batch, size or prompt_len] and lengths int32 [batch]."""
    size = size or self.config.prompt_len
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return tokens, lengths

  def keys(self, domain: str, first: int, count: int) -> jax.Array:
    """One key a request, whatever batch it is decoded in."""
    number = domains.DOMAINS.index(domain)
    root = jax.random.fold_in(jax.random.key(self.config.seed), number)
    rows = jnp.arange(first, first + count, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, rows)

  def call(
    self,
    *,
    drafter: str | None,
    policy: Any,
    shape: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
    keys: jax.Array,
    temperature: float,
    new_tokens: int,
    dtype: str,
    reference: np.ndarray | None = None,
    log_trees: bool = False,
    limit: int | None = None,
    attention_fn: attention.AttentionFn = attention.DenseAttention(),
    drafter_attention_fn: attention.AttentionFn | None = None,
  ) -> Call:
    """Decodes one batch; plainly where `drafter` is None.

    Args:
      drafter: name, or None.
      policy: of the drafter.
      shape: `TreeShape`.
      tokens: int32 [batch, prompt_len].
      lengths: int32 [batch].
      keys: one a row.
      temperature: 0 is greedy.
      new_tokens: room for new tokens, part of what is compiled.
      dtype: of the target and the head.
      reference: int32 [batch, new_tokens], what the rows are taken to write;
        default: their own, as plain decoding always does.
      log_trees: see `speculative.generate`.
      limit: steps to take; default until all rows are done.
      attention_fn: of the prefill, of target and head.
      drafter_attention_fn: of the head, where it is another one.
    """
    arguments = dict(
      drafter=drafter,
      policy=policy,
      shape=shape,
      tokens=tokens,
      lengths=lengths,
      keys=keys,
      temperature=temperature,
      new_tokens=new_tokens,
      dtype=dtype,
      reference=reference,
      log_trees=log_trees,
      limit=limit,
      attention_fn=attention_fn,
      drafter_attention_fn=drafter_attention_fn,
    )
    if dtype == "float32":
      # Or a GPU would round the factors of products to 10 bits.
      with jax.default_matmul_precision("highest"):
        return self._call(**arguments)
    return self._call(**arguments)

  def _call(
    self,
    *,
    drafter,
    policy,
    shape,
    tokens,
    lengths,
    keys,
    temperature,
    new_tokens,
    dtype,
    reference,
    log_trees,
    limit,
    attention_fn,
    drafter_attention_fn,
  ) -> Call:
    target = self._target(dtype)
    sampler: models.Sampler = models.Greedy()
    if temperature:
      sampler = models.Temperature(temperature=temperature)
    if drafter is None:
      return _plain(
        target, tokens, lengths, keys, sampler, new_tokens, attention_fn
      )
    if reference is None:
      # Data, so that calls with a text and without are one program.
      reference = np.full((len(tokens), new_tokens), -1, np.int32)
    start = time.perf_counter()
    session = speculative.prepare(
      target,
      self.drafter(drafter, dtype),
      tokens,
      max_new_tokens=new_tokens,
      lengths=lengths,
      shape=shape,
      policy=policy,
      sampler=sampler,
      attention_fn=attention_fn,
      drafter_attention_fn=drafter_attention_fn,
      rng_key=keys if temperature else None,
      reference=reference,
      log_trees=log_trees,
      # Compared once, when the artefact is read: it reads every weight.
      check_drafter=False,
    )
    jax.block_until_ready(session.state)
    middle = time.perf_counter()
    session.run(limit)
    jax.block_until_ready(session.state.tokens)
    end = time.perf_counter()
    result = session.result()
    return Call(
      tokens=np.asarray(result.tokens),
      seconds=end - middle,
      prefill_seconds=middle - start,
      log=jax.device_get(result.log),
    )

  def warm(self, calls: Sequence[dict[str, Any]], num_threads: int):
    """Compiles what calls need, several at once."""
    for call in calls:  # Loaded once, not by every thread.
      self.target(call["dtype"])
      if call["drafter"] is not None:
        self.drafter(call["drafter"], call["dtype"])
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
      for _ in pool.map(lambda call: self.call(**{**call, "limit": 1}), calls):
        pass


def _plain(
  target, tokens, lengths, keys, sampler, new_tokens, attention_fn
) -> Call:
  start = time.perf_counter()
  logits, cache = models.prefill(
    target,
    tokens,
    lengths=lengths,
    capacity=-(-(tokens.shape[1] + new_tokens) // 128) * 128,
    attention_fn=attention_fn,
  )
  jax.block_until_ready((logits, cache))
  middle = time.perf_counter()
  out, cache = models.decode(
    target,
    logits,
    cache,
    max_new_tokens=new_tokens,
    sampler=sampler,
    rng_key=keys if sampler.needs_key else None,
  )
  out = np.asarray(jax.block_until_ready(out))
  end = time.perf_counter()
  return Call(
    tokens=out,
    seconds=end - middle,
    prefill_seconds=middle - start,
    log=None,
  )
