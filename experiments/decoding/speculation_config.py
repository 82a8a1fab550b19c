# SPDX-License-Identifier: Apache-2.0
"""Settings of calibration and measurement of speculative decoding."""

import dataclasses
import pathlib
from typing import Any

from experiments.frame import flags_and_configs
from experiments.prefill import long_context_config
from pallas_kernels import checks
from unisparse_jax import models
from unisparse_jax.data import domains
from unisparse_jax.speculative import head_files, tree

PLAIN = "plain"
# In the order in which they are measured: the later ones need the earlier.
METHODS = (
  PLAIN,
  "fixed",  # EAGLE-3: a dynamic tree of fixed depth and size
  "heterospec",  # the paper's rule with alpha and gamma
  "joint",  # depth and size of each bin searched together
  "thrifty",  # fewest verified tokens for the fixed tree's tokens per call
  "fixed_same",  # fixed tree with the mean nodes of `heterospec`
  "fixed_best",  # the fixed tree that the replay finds fastest
  "predictive",  # learned acceptance predictor, ours
  "gated",  # predictive, and no drafting where it does not pay
  "eagle2",  # a dynamic tree of depth 6
  "ngram",
  "suffix",
  "combined",  # suffix matching, or the fixed tree where that pays more
  "static",  # EAGLE-1: a tree of fixed shape
  "oracle",  # knows the output: a bound for every policy
)
# "unisparse": target and head by top-p; "calibrated": the target by the
# settings by layer and head that lie beside its weights, the head as before.
PREFILLS = ("dense", "unisparse", "calibrated")
CALIBRATED = (
  *("heterospec", "joint", "thrifty", "fixed_best", "predictive", "gated"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """The logging run and what is fitted to it.

  Attributes:
    prompts: of each domain; none of them is measured later.
    new_tokens: of each.
    batch_size: rows logged together.
    temperatures: of the logged runs.
    timed_steps: steps of each timed fixed policy.
    timed_turns: calls of each that count, after as many that do not.
    min_leaf: see `calibration.fit_thresholds`.
    criterion: see there.
    alpha: of the paper's rule; 0: ceil(base_depth / 2).
    first_bin: 0 or 1, the paper's two readings.
    held_out: share of the requests that policies are compared on.
    max_seconds: after which no further batch size is timed. None: no limit.
  """

  prompts: int = 32
  new_tokens: int = 128
  batch_size: int = 16
  temperatures: tuple[float, ...] = (0.0, 1.0)
  timed_steps: int = 48
  timed_turns: int = 8
  min_leaf: float = 0.02
  criterion: str = "weighted"
  alpha: int = 0
  first_bin: int = 0
  held_out: float = 0.2
  max_seconds: float | None = None

  def __post_init__(self):
    for name in (
      *("prompts", "new_tokens", "batch_size", "timed_steps", "timed_turns"),
    ):
      checks.check_positive_int(name, getattr(self, name))
    checks.check_choice("criterion", self.criterion, ("weighted", "printed"))
    checks.check_choice("first_bin", self.first_bin, (0, 1))
    checks.check_non_negative_int("alpha", self.alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
  """What is calibrated and measured.

  Attributes:
    target: folder of the decoder, or the name of one that ships.
    head: folder of its draft head, or the name of a model that ships with one.
    corpus: folder of a tokenised corpus; prompts are of its held-out split.
      "": the standard library, tokenised into the workdir.
    artefact: file that the calibration writes and the measurement reads.
    shape: sizes of the tree of every method but the three below; `fixed` is
      compiled for the one depth and the size that it needs.
    packed: (batch, sizes...) of the batches whose rows share one verification,
      but for `fixed`; sizes count the nodes of all rows, roots included.
    chain_shape: of n-gram and suffix drafting.
    static_shape: of the static tree.
    combined_shape: of `combined`; its max_depth is the lookup's, the head has
      that of `shape`.
    combined_nodes: most nodes of its lookup, root not counted.
    combined_cost: time of one of its steps with the fixed tree, over that of
      one with a lookup.
    calibration: see there.
    fixed_depth: levels of the fixed tree.
    fixed_nodes: its draft nodes, root not counted.
    methods: of METHODS; plain decoding is always measured.
    domains: of `data.domains.DOMAINS`.
    batches: rows decoded together.
    temperatures: 0 is greedy.
    few: methods measured only at the batches and temperatures of `few_at`.
    few_at: (batch, temperature) of those.
    prompts: of each domain; a batch takes as many as it has rows, from
      the first on.
    prompt_len: tokens that every prompt is padded to; those of "long_context"
      fill most of it, the others `short_prompt`.
    short_prompt: tokens of the other prompts.
    new_tokens: of each row.
    same_text: whether the calls that are timed and counted are taken to write
      what plain decoding does, all else computed as ever. In bfloat16 methods
      part near ties, and every text has its own tokens a call. What they write
      of their own is compared all the same, and float32 comparisons are of it
      alone.
    repeats: turns in which all methods of a place are timed on each batch, of
      which the median counts.
    batch_1_prompts: prompts of each domain that a batch of 1 takes in turn.
    long_prompts: lengths of long prompts, one request each, whose prefill and
      answer are timed together, dense and sparse.
    long_new_tokens: tokens of their answers.
    long_methods: of METHODS, beside plain decoding.
    long_prefills: of PREFILLS.
    long_top_p: of UniSparse in the sparse prefills.
    exact_prompts: prompts of each domain whose float32 output is compared.
    exact_batches: rows of these comparisons.
    exact_new_tokens: tokens of each.
    dtype: of weights and activations where time is measured.
    compile_threads: programs of a place (kind, batch, temperature) compiled at
      once before it is measured; 0: each when it is first needed.
    max_seconds: budget; what does not fit is left out, and a later call goes
      on. None: no limit.
    seed: of prompts and draws.
  """

  target: str
  head: str
  corpus: str
  artefact: str
  shape: tree.TreeShape
  chain_shape: tree.TreeShape
  static_shape: tree.TreeShape
  combined_shape: tree.TreeShape
  calibration: Calibration
  packed: tuple[tuple[int, ...], ...] = ()
  fixed_depth: int = 8
  fixed_nodes: int = 60
  combined_nodes: int = 31
  combined_cost: float = 1.7
  methods: tuple[str, ...] = METHODS
  domains: tuple[str, ...] = domains.DOMAINS
  batches: tuple[int, ...] = (1, 4, 16, 64)
  temperatures: tuple[float, ...] = (0.0, 1.0)
  few: tuple[str, ...] = ()
  few_at: tuple[tuple[int, float], ...] = ()
  prompts: int = 64
  prompt_len: int = 1024
  short_prompt: int = 256
  new_tokens: int = 256
  same_text: bool = True
  repeats: int = 5
  batch_1_prompts: int = 4
  long_prompts: tuple[int, ...] = ()
  long_new_tokens: int = 512
  long_methods: tuple[str, ...] = ("fixed", "heterospec")
  long_prefills: tuple[str, ...] = ("dense", "unisparse")
  long_top_p: float = 0.95
  exact_prompts: int = 4
  exact_batches: tuple[int, ...] = (1, 4)
  exact_new_tokens: int = 64
  dtype: str = "bfloat16"
  compile_threads: int = 0
  max_seconds: float | None = None
  seed: int = 0

  def __post_init__(self):
    checks.check_non_negative_int("compile_threads", self.compile_threads)
    for name in (
      "fixed_depth",
      "fixed_nodes",
      "prompts",
      "prompt_len",
      "short_prompt",
      "new_tokens",
      "repeats",
      "batch_1_prompts",
      "exact_new_tokens",
    ):
      checks.check_positive_int(name, getattr(self, name))
    checks.check_non_negative_int("exact_prompts", self.exact_prompts)
    for name, allowed in (("methods", METHODS), ("domains", domains.DOMAINS)):
      for value in getattr(self, name):
        checks.check_choice(name, value, allowed)
    for method in self.long_methods:
      checks.check_choice("long_methods", method, METHODS)
    for prefill in self.long_prefills:
      checks.check_choice("long_prefills", prefill, PREFILLS)
    checks.check_fraction("long_top_p", self.long_top_p)
    for method in self.few:
      checks.check_choice("few", method, METHODS)
    for name in ("batches", "temperatures", "domains"):
      checks.require(getattr(self, name), name, "not be empty", ())
    for batch in self.batches:
      checks.check_positive_int("batches", batch)
      checks.require(
        batch <= self.prompts or batch == 1,
        "batches",
        "be at most the prompts of a domain",
        batch,
        f"<= {self.prompts}",
      )
    checks.require(
      self.short_prompt <= self.prompt_len,
      "short_prompt",
      "be at most prompt_len",
      self.short_prompt,
      f"<= {self.prompt_len}",
    )
    checks.require(
      self.fixed_depth <= (self.shape.max_depth or 0)
      and self.fixed_nodes + 1 <= self.shape.max_nodes,
      "fixed_depth and fixed_nodes",
      "fit the tree's shape",
      (self.fixed_depth, self.fixed_nodes),
      f"max_depth={self.shape.max_depth}, max_nodes={self.shape.max_nodes}",
    )
    for name in ("width", "base_depth"):
      checks.require(
        getattr(self.combined_shape, name) == getattr(self.shape, name),
        "combined_shape",
        f"have the {name} of shape",
        getattr(self.combined_shape, name),
        f"{name}={getattr(self.shape, name)}",
      )
    for batch, *sizes in self.packed:
      checks.require(
        bool(sizes) and sizes[0] >= batch,
        "packed",
        "leave room for the root of every row",
        (batch, *sizes),
        "a batch and its sizes",
      )
    checks.check_choice("dtype", self.dtype, ("float32", "bfloat16"))

  def shape_for(self, batch: int) -> tree.TreeShape:
    """The tree's sizes for a batch."""
    sizes = {entry[0]: tuple(entry[1:]) for entry in self.packed}
    if batch not in sizes:
      return self.shape
    return dataclasses.replace(self.shape, packed=sizes[batch])

  @property
  def fixed_shape(self) -> tree.TreeShape:
    """Of the method `fixed`: nothing adapts, every row has all its nodes."""
    largest = next(x for x in self.shape.buckets if x > self.fixed_nodes)
    return dataclasses.replace(
      self.shape,
      base_depth=self.fixed_depth,
      max_depth=self.fixed_depth,
      buckets=(largest,),
    )

  def combined_shape_for(self, batch: int) -> tree.TreeShape:
    """`shape_for` of the method `combined`."""
    packed = self.shape_for(batch).packed
    return dataclasses.replace(self.combined_shape, packed=packed)

  @property
  def wants_artefact(self) -> bool:
    """Whether a method needs the calibration."""
    return bool(set(self.methods) & {*CALIBRATED, "fixed_same"})

  def check_model(self, model: models.DecoderConfig):
    """Raises ValueError where the model is too short."""
    longest = self.prompt_len + max(
      self.new_tokens, self.calibration.new_tokens, self.exact_new_tokens
    )
    for length in self.long_prompts:
      longest = max(longest, length + self.long_new_tokens)
    checks.require(
      longest <= model.max_len,
      "a prompt and its new tokens",
      "not exceed the model's max_len",
      longest,
      f"<= {model.max_len}",
    )


def parse(config: Any) -> SpeculationConfig:
  """Builds the settings; ValueError for an unknown key or a bad value."""
  return flags_and_configs.to_dataclass(
    SpeculationConfig, config, name="config"
  )


def head_folder(path: str) -> pathlib.Path:
  """Folder of a draft head, or of a model that ships with one; ValueError."""
  for folder in (long_context_config.PRETRAINED / path, pathlib.Path(path)):
    if (folder / head_files.SETTINGS).is_file():
      return folder
  raise ValueError(
    f"config.head must be a draft head's folder; got head={path!r}; expected "
    "what experiments.train_draft_head wrote, or a model that ships with one."
  )
