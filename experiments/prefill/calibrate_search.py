# SPDX-License-Identifier: Apache-2.0
"""What a calibration measures of a layer, and how it chooses."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.frame import flags_and_configs
from pallas_kernels import checks
from unisparse_jax import attention, data, evaluation, tasks
from unisparse_jax.attention import budgets, calibration
from unisparse_jax.attention.patterns import minference

# Field that sets how much a head keeps.
BUDGETS = {
  name: budgets.BUDGETS[pattern]
  for name, pattern in attention.PATTERNS.items()
  if pattern in budgets.BUDGETS
}
PROFILER = "xattention_profiler"
SEARCHES = ("minference_recall", "minference_error")
RULES = (*calibration.RULES, PROFILER, *SEARCHES)
_FIRST_ROW = (
  2500  # of MInference's search; at most half of the text is left out
)
_LARGE_ERROR = 5e-3  # likewise: of an output element
_CODE = "code"
_TIMED_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
  """What is calibrated.

  Attributes:
    model: folder of a checkpoint, or the name of one that ships.
    method: the pattern: one of `BUDGETS`, or "minference".
    settings: of the pattern, the same for all heads.
    rule: "equal_recall": every head reaches the target. "equal_slope": the mean
      does, with few blocks. "fewest_blocks": likewise, with the fewest of all.
      "lowered_steps": likewise, thresholds being lowered by XAttention's
      dynamic programme along `budgets`, which must fall.
      "xattention_profiler": thresholds as
      XAttention's released code finds them. "minference_recall",
      "minference_error": MInference's candidate of most recall, or of fewest
      large output errors, as in its two released searches.
    target_recall: mean recall aimed at; with "xattention_profiler", the share
      of each row that its blocks shall hold.
    budgets: values that are tried.
    compare_rules: whether to measure every budget on the test text as well, and
      to note what each rule of `calibration.RULES` would have come to there.
    candidates: heads that MInference's search tries.
    length: tokens of a text; a multiple of the pattern's blocks.
    texts: "code" or names of tasks; one text of each.
    test_text: where the result is checked, on other text than `texts`.
    dense_lengths: lengths at which dense attention is timed beside sparse, in
      rising order; none: `dense_below` is 0.
    timed_dtype: of q, k, v in those timings; kernels of a GPU want bfloat16.
    seed: of the texts.
  """

  model: str
  method: str
  length: int
  texts: tuple[str, ...]
  test_text: str
  settings: Mapping = dataclasses.field(default_factory=dict)
  rule: str = "equal_recall"
  target_recall: float = 0.95
  budgets: tuple[float, ...] = ()
  compare_rules: bool = False
  candidates: tuple = minference.CANDIDATES
  dense_lengths: tuple[int, ...] = ()
  timed_dtype: str = "float32"
  seed: int = 0

  def __post_init__(self):
    checks.check_choice("method", self.method, (*BUDGETS, "minference"))
    checks.check_choice("rule", self.rule, RULES)
    checks.check_fraction("target_recall", self.target_recall)
    checks.require(
      (self.method == "minference") == (self.rule in SEARCHES),
      "rule",
      "fit the method",
      self.rule,
      f"one for {self.method}",
    )
    checks.require(
      self.rule != PROFILER or self.method == "xattention",
      "rule",
      "fit the method",
      self.rule,
      f"one for {self.method}",
    )
    if self.rule in calibration.RULES:
      checks.require(len(self.budgets) > 1, "budgets", "hold 2 or more", ())
    falls = list(self.budgets) == sorted(set(self.budgets), reverse=True)
    checks.require(
      self.rule != "lowered_steps" or falls, "budgets", "fall", self.budgets
    )
    checks.require(
      not self.compare_rules or (self.rule in calibration.RULES and falls),
      "compare_rules",
      "be asked for with a rule that tries falling budgets",
      self.budgets,
    )
    checks.check_positive_int("length", self.length)
    for text in (*self.texts, self.test_text):
      checks.check_choice("texts", text, (_CODE, *tasks.TASKS))
    checks.require(len(self.texts) > 0, "texts", "not be empty", ())
    checks.require(
      list(self.dense_lengths) == sorted(set(self.dense_lengths))
      and all(0 < n <= self.length for n in self.dense_lengths),
      "dense_lengths",
      "rise and not exceed length",
      self.dense_lengths,
    )
    checks.check_choice("timed_dtype", self.timed_dtype, _TIMED_DTYPES)
    pattern = self.make_pattern()
    for block in (pattern.block_q, pattern.block_kv):
      checks.check_divides("block", block, "length", self.length)
    for budget in self.budgets if self.method in BUDGETS else ():
      self.make_pattern(**{BUDGETS[self.method]: budget})
    for candidate in self.candidates if self.method == "minference" else ():
      self.make_pattern(heads=(candidate,))

  def make_pattern(self, **own: Any) -> attention.Pattern:
    """The pattern with the common settings and a layer's own."""
    settings = flags_and_configs.to_dict(self.settings)
    return attention.make_pattern(self.method, **settings, **own)

  def tokens(self, corpus: data.CodeCorpus, text: str) -> jax.Array:
    """int32 [1, length]; the test text is drawn apart from the others."""
    mixture = data.Mixture(
      **dict.fromkeys((*tasks.TASKS, _CODE), 0.0) | {text: 1.0}, full_row=1.0
    )
    seed = self.seed + (text not in self.texts)
    rows = data.TrainingRows(corpus, seed, self.length, mixture)
    index = int(text == self.test_text and text in self.texts)
    return jnp.asarray(rows[index]["tokens"][None, :-1], jnp.int32)


def parse(config: Any) -> CalibrateConfig:
  """Builds the settings; ValueError for an unknown key or a bad value."""
  return flags_and_configs.to_dataclass(CalibrateConfig, config, name="config")


def measure(config: CalibrateConfig, q, k, v) -> dict[str, Any]:
  """What the rule needs to know of a layer, by head."""
  if config.rule in SEARCHES:
    return _measure_candidates(config, q, k, v)
  if config.rule == PROFILER:
    pattern = config.make_pattern()
    mass = _block_mass(pattern, q, k)
    scores = _block_scores(pattern, q, k)
    thresholds = calibration.xattention_threshold(
      np.asarray(scores[0], np.float64),
      np.asarray(mass[0], np.float64),
      config.target_recall,
    )
    return {"thresholds": thresholds}
  densities, recalls, mass = [], [], None
  for budget in config.budgets:
    pattern = config.make_pattern(**{BUDGETS[config.method]: budget})
    if mass is None:
      mass = _block_mass(pattern, q, k)
    density, recall = density_and_recall(pattern, q, k, mass)
    densities.append(density)
    recalls.append(recall)
  return {
    "density": np.stack(densities, axis=1),
    "recall": np.stack(recalls, axis=1),
  }


def density_and_recall(
  pattern: attention.Pattern, q, k, mass=None
) -> tuple[np.ndarray, np.ndarray]:
  """Of each mask head: token density, and recall as mean over its heads.

  Args:
    pattern: the method.
    q: [1, q_len, num_heads, head_dim].
    k: [1, kv_len, num_kv_heads, head_dim].
    mass: `metrics.block_mass` of them if known, which spares a dense pass where
      the mask has no columns.
  """
  mask = _select(pattern, q, k)
  density = np.asarray(_nominal_density(mask)[0])
  if mask.columns is None:
    mass = _block_mass(pattern, q, k) if mass is None else mass
    recall = np.asarray(_kept_mass(mask, mass)[0])
  else:
    recall = np.asarray(_recall(q, k, mask)[0].mean(0))
  return density, recall.reshape(len(density), -1).mean(1)


def choose(
  config: CalibrateConfig, found: Sequence[dict], num_layers: int
) -> tuple[dict[str, Any], ...]:
  """Settings of each layer, from the records of all texts."""

  def mean(layer, name):
    values = [
      r[name]
      for r in found
      if r["layer"] == layer and r["text"] in config.texts
    ]
    assert len(values) == len(config.texts), "every text was measured"
    return np.mean(values, axis=0)

  layers = range(num_layers)
  if config.rule in SEARCHES:
    best = [mean(n, "scores").argmax(1) for n in layers]
    return tuple(
      {"heads": tuple(config.candidates[i] for i in row)} for row in best
    )
  if config.rule == PROFILER:
    return tuple(
      {"top_p": tuple(round(float(x), 6) for x in mean(n, "thresholds"))}
      for n in layers
    )
  density, recall = (
    _of_texts(found, name, config.texts) for name in ("density", "recall")
  )
  index = calibration.choose_budgets(
    density, recall, config.target_recall, config.rule
  ).reshape(num_layers, -1)
  field = BUDGETS[config.method]
  return tuple(
    {field: tuple(float(config.budgets[i]) for i in row)} for row in index
  )


def compare_rules(
  config: CalibrateConfig, found: Sequence[dict]
) -> list[dict[str, Any]]:
  """What each rule, and each budget for all heads, comes to on the test text.

  Args:
    config: the settings; `compare_rules` is set.
    found: records of all texts, the test text among them.

  Returns:
    Rows with "rule" (or "budget"), the mean "budget" of the heads, and
    "density" and "recall" on the texts it was chosen on and, with "test_"
    before the name, on the test text.
  """
  tables = {
    f"{prefix}{name}": _of_texts(found, name, texts)
    for name in ("density", "recall")
    for prefix, texts in (("", config.texts), ("test_", (config.test_text,)))
  }
  heads = np.arange(len(tables["density"]))
  choices: list[tuple[str, np.ndarray]] = [
    (
      rule,
      calibration.choose_budgets(
        tables["density"], tables["recall"], config.target_recall, rule
      ),
    )
    for rule in calibration.RULES
  ]
  choices += [
    ("the same for all", np.full(len(heads), i))
    for i in range(len(config.budgets))
  ]
  return [
    {
      "rule": rule,
      "budget": float(np.mean([config.budgets[i] for i in index])),
      **{name: float(x[heads, index].mean()) for name, x in tables.items()},
    }
    for rule, index in choices
  ]


def _of_texts(found, name, texts) -> np.ndarray:
  """[all mask heads, budgets], mean over texts."""
  layers = sorted({r["layer"] for r in found})
  return np.concatenate(
    [
      np.mean(
        [r[name] for r in found if r["layer"] == layer and r["text"] in texts],
        axis=0,
      )
      for layer in layers
    ]
  )


def single_budget(
  config: CalibrateConfig, found: Sequence[dict]
) -> dict[str, Any] | None:
  """Sparsest budget that reaches the target in the mean, for all heads alike.

  Returns:
    {field: budget}; None where none reaches it, or the rule tries no budgets.
  """
  if config.rule not in calibration.RULES:
    return None
  density, recall = (
    np.mean(
      [np.mean(r[name], axis=0) for r in found if r["text"] in config.texts],
      axis=0,
    )
    for name in ("density", "recall")
  )
  reached = [
    i for i in np.argsort(density) if recall[i] >= config.target_recall
  ]
  if not reached:
    return None
  return {BUDGETS[config.method]: config.budgets[reached[0]]}


def measure_dense_below(config: CalibrateConfig, call, settings):
  """Length from which sparse attention is faster, and the times that say so.

  Args:
    config: the settings.
    call: (q, k, v) of a layer.
    settings: of that layer.

  Returns:
    The length up to which dense attention is to be used: one more than the
      longest at which it was not slower; 0 with no lengths to time. And
      {length: (dense ms, sparse ms)}.
  """
  sparse = attention.SparseAttention(pattern=config.make_pattern(**settings))
  limit, times = 0, {}
  for length in config.dense_lengths:
    inputs = [x[:, :length].astype(config.timed_dtype) for x in call]
    dense_ms, sparse_ms = (
      evaluation.time_attention(fn, *inputs, repeats=3).total_ms
      for fn in (attention.DenseAttention(), sparse)
    )
    times[str(length)] = (dense_ms, sparse_ms)
    if dense_ms <= sparse_ms:
      limit = length + 1
  return limit, times


def _measure_candidates(config, q, k, v):
  """Score of each candidate by head; the highest wins."""
  first = min(_FIRST_ROW, q.shape[1] // 2)
  dense = attention.dense_attention(q, k, v)
  scores = []
  for candidate in config.candidates:
    mask = _select(config.make_pattern(heads=(tuple(candidate),)), q, k)
    if config.rule == "minference_recall":
      scores.append(np.asarray(_recall(q, k, mask)[0, first:].mean(0)))
    else:
      out = jnp.asarray(attention.sparse_attention(q, k, v, mask))
      error = np.abs(np.asarray(out - dense, np.float32))[0]
      scores.append(-(error > _LARGE_ERROR).sum((0, 2)).astype(np.float64))
  return {"scores": np.stack(scores, axis=1)}


@functools.partial(jax.jit, static_argnums=0)
def _select(pattern, q, k):
  return pattern.select(q, k)


_nominal_density = jax.jit(attention.metrics.nominal_density)
_recall = jax.jit(attention.metrics.recall)


def _block_mass(pattern, q, k):
  return _mass(q, k, block_q=pattern.block_q, block_kv=pattern.block_kv)


@functools.partial(jax.jit, static_argnames=("block_q", "block_kv"))
def _mass(q, k, *, block_q, block_kv):
  grid = attention.BlockGrid.create(q, k, block_q=block_q, block_kv=block_kv)
  return attention.metrics.block_mass(q, k, grid)


@functools.partial(jax.jit, static_argnums=0)
def _block_scores(pattern, q, k):
  grid = attention.BlockGrid.create(
    q, k, block_q=pattern.block_q, block_kv=pattern.block_kv
  )
  return pattern.block_scores(q, k, grid)


@jax.jit
def _kept_mass(mask, mass):
  """Mean over rows of the mass on kept blocks; rows are of equal length."""
  kept = jnp.repeat(
    mask.to_dense(), mass.shape[1] // mask.num_mask_heads, axis=1
  )
  return jnp.where(kept, mass, 0.0).sum(-1).mean(-1)
