# SPDX-License-Identifier: Apache-2.0
"""Settings of the long-context experiment, checked before anything runs."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.frame import flags_and_configs
from pallas_kernels import checks
from pallas_kernels.block_sparse_attention import api
from unisparse_jax import attention, models, tasks
from unisparse_jax.attention import dense

DENSE = "dense"  # label of the reference, measured in every run
JAX_NN = "jax.nn"  # label of `jax.nn.dot_product_attention`
CALIBRATED = "calibrated"  # method whose settings are read from a file
_CALIBRATION = "sparse_attention.json"  # that file beside a model's weights
MEASURES = ("answers", "next_token", "layers", "attention_time", "prefill")
REFERENCE_MEASURES = ("answers", "next_token", "prefill")
PRETRAINED = pathlib.Path(models.__file__).parents[1] / "pretrained"
_WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternEntry:
  """One row of the result.

  Attributes:
    label: name in tables and records.
    patterns: the method with its settings: one for all layers, or one for each.
    measure: which of `MEASURES` to take.
  """

  label: str
  patterns: tuple[attention.Pattern, ...]
  measure: tuple[str, ...]

  def pattern(self, layer: int) -> attention.Pattern:
    """That of a layer."""
    return self.patterns[layer if len(self.patterns) > 1 else 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContextConfig:
  """What is measured.

  Attributes:
    model: folder of a checkpoint, or the name of one that ships.
    patterns: mappings with "label", "method", optionally "measure" (default
      all of `MEASURES`) and the method's own settings. The method
      "calibrated" has two: "file", as `experiments.calibrate` writes it,
      default sparse_attention.json in the model's folder; and "factor", default
      1, which multiplies the limits of "unisparse_threshold".
    lengths: tokens of a prompt and its answer.
    reference_measure: which of `REFERENCE_MEASURES` to take of dense attention;
      where attention is timed, dense attention is as well.
    tasks: names in `tasks.TASKS`; none: no answers.
    samples: prompts of each task and length.
    code_rows: stretches of held-out code for the next-token comparison.
    quality_layers: layers whose recall is measured; none: all.
    timed_layers: layers whose attention is timed.
    mask_layers: layers whose heads may be drawn.
    mask_label: the pattern that is drawn; "" draws none.
    implementation: back end of sparse attention; named, so that none is fallen
      back to.
    dense_implementation: that of the dense reference.
    jax_nn_max_len: longest input `jax.nn.dot_product_attention` is timed on;
      it stores the logit matrix.
    repeats: timed calls of an attention.
    prefill_repeats: timed calls of a prefill.
    batch_size: prompts answered together.
    dtype: of weights and activations.
    seed: of prompts and code.
    scan_layers: compile one layer for all, and one program for all budgets of
      a pattern (`long_context_programs`); prompts are prefilled one by one and
      those of a task decoded together. The code of "next_token" has a prompt's
      length then, so that one program serves both.
    captured_task: task whose prompt, filled up in front with code, attention is
      timed and compared on; "": code alone. With scan_layers only.
    compile_threads: programs compiled at the same time, with scan_layers.
    max_seconds: no measurement begins after this many; None: no limit.
  """

  model: str
  patterns: tuple
  lengths: tuple[int, ...]
  reference_measure: tuple[str, ...] = REFERENCE_MEASURES
  tasks: tuple[str, ...] = ()
  samples: int = 1
  code_rows: int = 1
  quality_layers: tuple[int, ...] = ()
  timed_layers: tuple[int, ...] = (0,)
  mask_layers: tuple[int, ...] = (0,)
  mask_label: str = ""
  implementation: str = "xla"
  dense_implementation: str = "tiled"
  jax_nn_max_len: int = 8192
  repeats: int = 3
  prefill_repeats: int = 1
  batch_size: int = 1
  dtype: str = "float32"
  seed: int = 0
  scan_layers: bool = False
  captured_task: str = ""
  compile_threads: int = 4
  max_seconds: float | None = None

  def __post_init__(self):
    for name in ("samples", "code_rows", "repeats", "prefill_repeats"):
      checks.check_positive_int(name, getattr(self, name))
    checks.check_positive_int("batch_size", self.batch_size)
    checks.check_positive_int("compile_threads", self.compile_threads)
    checks.check_non_negative_int("seed", self.seed)
    if self.captured_task:
      checks.check_choice("captured_task", self.captured_task, tasks.TASKS)
    checks.require(
      self.scan_layers or not self.captured_task,
      "captured_task",
      "be empty without scan_layers",
      self.captured_task,
    )
    checks.check_non_negative_int("jax_nn_max_len", self.jax_nn_max_len)
    for name in ("lengths", "patterns", "timed_layers"):
      checks.require(getattr(self, name), name, "not be empty", ())
    for name in ("lengths", "tasks", "quality_layers", "timed_layers"):
      values = getattr(self, name)
      unique = len(set(values)) == len(values)
      checks.require(unique, name, "name nothing twice", values)
    for length in self.lengths:
      checks.check_positive_int("lengths", length)
    for task in self.tasks:
      checks.check_choice("tasks", task, tasks.TASKS)
    for kind in self.reference_measure:
      checks.check_choice("reference_measure", kind, REFERENCE_MEASURES)
    checks.check_choice("dtype", self.dtype, ("float32", "bfloat16"))
    checks.check_choice(
      "implementation", self.implementation, api.IMPLEMENTATIONS
    )
    checks.check_choice(
      "dense_implementation", self.dense_implementation, dense.IMPLEMENTATIONS
    )
    labels = [entry.label for entry in self.entries]
    checks.require(
      len(set(labels)) == len(labels), "patterns", "have one label each", labels
    )
    if self.mask_label:
      checks.check_choice("mask_label", self.mask_label, labels)

  @property
  def answer_len(self) -> int:
    """Tokens of the longest answer; 0 without tasks."""
    budgets = [tasks.TASKS[task].max_new_tokens for task in self.tasks]
    return max(budgets, default=0)

  def prompt_len(self, length: int) -> int:
    """Tokens of a prompt that leaves room for the longest answer."""
    return length - self.answer_len

  def measures(self) -> dict[str, tuple[str, ...]]:
    """{label: what is measured of it}, the reference first."""
    return {DENSE: self.reference_measure} | {
      entry.label: entry.measure for entry in self.entries
    }

  @functools.cached_property
  def entries(self) -> tuple[PatternEntry, ...]:
    """`patterns`, built."""
    return tuple(
      _entry(values, f"config.patterns[{i}]", self.model)
      for i, values in enumerate(self.patterns)
    )

  def entry(self, label: str) -> PatternEntry:
    """The pattern of this label."""
    return {entry.label: entry for entry in self.entries}[label]

  def attention_fn(self, label: str) -> attention.AttentionFn:
    """The attention of a label, `DENSE` and `JAX_NN` among them."""
    if label == DENSE:
      return attention.DenseAttention(implementation=self.dense_implementation)
    if label == JAX_NN:
      return attention.DenseAttention(implementation="xla")
    layers = tuple(
      attention.SparseAttention(
        pattern=pattern, implementation=self.implementation
      )
      for pattern in self.entry(label).patterns
    )
    if len(layers) == 1:
      return layers[0]
    return attention.LayeredAttention(layers=layers)

  def check_model(self, model: models.DecoderConfig):
    """Raises ValueError where the model cannot serve these settings."""
    for length in self.lengths:
      checks.require(
        length <= model.max_len,
        "lengths",
        "not exceed the model's max_len",
        length,
        f"<= {model.max_len}",
      )
      for task in self.tasks:
        budget = tasks.TASKS[task].max_new_tokens
        checks.require(
          length > budget,
          "lengths",
          f"hold an answer to {task}",
          length,
          f"> {budget}",
        )
    for entry in self.entries:
      checks.require(
        len(entry.patterns) in (1, model.num_layers),
        f"patterns of {entry.label}",
        "be one for each layer of the model",
        len(entry.patterns),
        str(model.num_layers),
      )
    for name in ("quality_layers", "timed_layers", "mask_layers"):
      for layer in getattr(self, name):
        checks.require(
          isinstance(layer, int) and 0 <= layer < model.num_layers,
          name,
          "be layers of the model",
          layer,
          f"0 to {model.num_layers - 1}",
        )


def parse(config: Any) -> LongContextConfig:
  """Builds the settings; ValueError for an unknown key or a bad value."""
  return flags_and_configs.to_dataclass(
    LongContextConfig, config, name="config"
  )


def model_folder(name: str) -> pathlib.Path:
  """Folder of a checkpoint: a path, or the name of one that ships."""
  for folder in (PRETRAINED / name, pathlib.Path(name)):
    if (folder / "config.json").is_file():
      return folder
  shipped = sorted(p.parent.name for p in PRETRAINED.glob("*/config.json"))
  raise ValueError(
    "config.model must be a checkpoint's folder or a shipped model; got "
    f"model={name!r}; expected a folder with config.json, or one of {shipped}."
  )


# How a run is made, not what: two calls on one workdir may differ here. Of a
# length nothing depends on the others, so they may be taken one by one.
FREE = ("compile_threads", "max_seconds", "lengths")


def identity(config: LongContextConfig, folder: pathlib.Path) -> dict[str, Any]:
  """What must agree for two calls to share a workdir, but for `FREE`."""
  weights = folder / _WEIGHTS
  values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  if weights.is_file():
    values["model_sha256"] = file_hash(weights)
  for entry in values.get("patterns", ()):
    if entry["method"] == CALIBRATED:
      name = f"{entry['label']} sha256"
      values[name] = file_hash(_calibration_file(entry, str(folder)))
  return values


def weights_hash(folder: pathlib.Path) -> str:
  """Checksum of a checkpoint's weights."""
  return file_hash(folder / _WEIGHTS)


def file_hash(file: pathlib.Path) -> str:
  """Checksum of any file."""
  return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def calibration_of(folder: pathlib.Path) -> attention.Calibration:
  """The sparse attention that lies beside a model's weights."""
  return attention.load_calibration(
    folder / _CALIBRATION, model_sha256=weights_hash(folder)
  )


def _calibration_file(settings: Mapping, model: str) -> pathlib.Path:
  if "file" in settings:
    return pathlib.Path(settings["file"])
  return model_folder(model) / _CALIBRATION


def _scaled(patterns: tuple, factor: float) -> tuple:
  """The limits of every layer and head, times a factor."""
  if factor == 1.0:
    return patterns
  checks.require(
    isinstance(factor, int | float) and factor > 0.0,
    "factor",
    "be above 0",
    factor,
  )
  for pattern in patterns:
    checks.require(
      isinstance(pattern, attention.UniSparseThreshold),
      "factor",
      "be 1 for a calibration of other patterns than unisparse_threshold",
      factor,
    )

  def scale(limits):
    if isinstance(limits, tuple):
      return tuple(scale(limit) for limit in limits)
    return factor * limits

  return tuple(
    dataclasses.replace(p, min_score=scale(p.min_score)) for p in patterns
  )


def _entry(values: Any, name: str, model: str) -> PatternEntry:
  if not isinstance(values, Mapping) and not hasattr(values, "to_dict"):
    raise ValueError(f"{name} must be a mapping; got {values!r}.")
  settings = flags_and_configs.to_dict(values)
  for key in ("label", "method"):
    if not isinstance(settings.get(key), str) or not settings[key]:
      raise ValueError(
        f"{name} must name its {key}; got {key}={settings.get(key)!r}."
      )
  label, method = settings.pop("label"), settings.pop("method")
  measure = tuple(settings.pop("measure", MEASURES))
  for kind in measure:
    checks.check_choice(f"{name}.measure", kind, MEASURES)
  if label in (DENSE, JAX_NN):
    raise ValueError(
      f"{name}.label must not be that of a baseline; got label={label!r}; "
      "the baselines are measured in every run."
    )
  try:
    if method == CALIBRATED:
      keys = ["file", "factor"]
      flags_and_configs.check_keys("settings of calibrated", settings, keys)
      file = _calibration_file(settings, model)
      patterns = _scaled(
        attention.load_calibration(file).patterns(),
        settings.get("factor", 1.0),
      )
    else:
      patterns = (attention.make_pattern(method, **settings),)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
  return PatternEntry(label=label, patterns=patterns, measure=measure)
