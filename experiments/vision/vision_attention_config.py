# SPDX-License-Identifier: Apache-2.0
"""Settings of the vision experiment, checked before anything runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.frame import flags_and_configs
from experiments.prefill import frontier_config, long_context_config
from experiments.vision import vision_attention_data, vision_attention_model
from pallas_kernels import checks
from pallas_kernels.block_sparse_attention import api
from unisparse_jax import attention
from unisparse_jax.attention import dense

DENSE = long_context_config.DENSE  # label of the reference
SITES = ("self", "cross")  # which attention: of the tiles, of the questions
WHERES = (*SITES, "both")  # which of them are sparse
MEASURES = ("quality", "time")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """Steps on videos of one length.

  Attributes:
    num_frames: of each video.
    steps: of the optimizer.
    batch: videos in a step.
    num_questions: of each video.
  """

  num_frames: int
  steps: int
  batch: int
  num_questions: int

  def __post_init__(self):
    for name in ("num_frames", "steps", "batch", "num_questions"):
      checks.check_positive_int(name, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How the reader is trained.

  Attributes:
    phases: one after the other.
    learning_rate: after the warm-up; falls to 0 by a cosine.
    warmup_steps: of the learning rate, from 0.
    weight_decay: of AdamW.
    checkpoint_every: steps.
  """

  phases: tuple[Phase, ...]
  learning_rate: float = 2e-3
  warmup_steps: int = 50
  weight_decay: float = 0.02
  checkpoint_every: int = 50

  def __post_init__(self):
    checks.require(len(self.phases) > 0, "phases", "not be empty", ())
    checks.check_positive_int("checkpoint_every", self.checkpoint_every)
    checks.check_non_negative_int("warmup_steps", self.warmup_steps)
    checks.require(
      self.learning_rate > 0.0, "learning_rate", "be > 0", self.learning_rate
    )

  @property
  def total_steps(self) -> int:
    """Of all phases."""
    return sum(phase.steps for phase in self.phases)

  def phase(self, step: int) -> Phase:
    """That of a step, which counts from 0."""
    for phase in self.phases:
      if step < phase.steps:
        return phase
      step -= phase.steps
    raise ValueError(f"step must be below total_steps; got {step} too many.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(frontier_config.Sweep):
  """A pattern at several budgets.

  Attributes:
    sites: where it is tried, of `SITES`.
    cross_settings: what it has in the questions' attention instead, as (name,
      value).
  """

  sites: tuple[str, ...] = SITES
  cross_settings: tuple = ()

  def __post_init__(self):
    super().__post_init__()
    for site in self.sites:
      checks.check_choice("sites", site, SITES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """What is trained and measured.

  Attributes:
    train: how the reader is trained.
    sweeps: mappings with the fields of `Sweep`, other keys being settings of
      the pattern.
    num_frames: of the videos that are measured on.
    num_questions: of each of them.
    num_videos: of them, of test digits.
    num_quality_videos: of these, the ones on which recall is measured.
    self_blocks: tokens in a block of queries, and of keys, among tiles.
    cross_blocks: the same of questions on tiles.
    measures: of `MEASURES`. Time is taken of each sweep's sparsest point that
      keeps the dense score. Two calls on one workdir may differ in this, in
      `sweeps` and in `mask_label`.
    mask_label: the point that is drawn; "" draws none.
    video: sizes of a video.
    model: sizes of the reader.
    implementation: back end of sparse attention; named, so that none is fallen
      back to.
    dense_implementation: that of the dense reference.
    matched_share: share of the dense score that counts as matched.
    repeats: timed calls.
    seed: of the split, the weights and the videos.
  """

  train: TrainConfig
  sweeps: tuple
  num_frames: int
  num_questions: int
  num_videos: int
  num_quality_videos: int = 1
  self_blocks: tuple[int, int] = (64, 64)
  cross_blocks: tuple[int, int] = (16, 64)
  measures: tuple[str, ...] = MEASURES
  mask_label: str = ""
  video: vision_attention_data.VideoConfig = vision_attention_data.VideoConfig()
  model: vision_attention_model.ModelConfig = (
    vision_attention_model.ModelConfig()
  )
  implementation: str = "xla"
  dense_implementation: str = "tiled"
  matched_share: float = 0.99
  repeats: int = 5
  seed: int = 0

  def __post_init__(self):
    for name in ("num_videos", "num_quality_videos", "repeats"):
      checks.check_positive_int(name, getattr(self, name))
    checks.require(
      self.num_quality_videos <= self.num_videos,
      "num_quality_videos",
      "not exceed num_videos",
      self.num_quality_videos,
    )
    checks.check_non_negative_int("seed", self.seed)
    checks.check_fraction("matched_share", self.matched_share)
    checks.check_choice(
      "implementation", self.implementation, api.IMPLEMENTATIONS
    )
    checks.check_choice(
      "dense_implementation", self.dense_implementation, dense.IMPLEMENTATIONS
    )
    for measure in self.measures:
      checks.check_choice("measures", measure, MEASURES)
    for num_frames, num_questions in (
      (self.num_frames, self.num_questions),
      *((p.num_frames, p.num_questions) for p in self.train.phases),
    ):
      checks.check_divides("4", 4, "num_frames", num_frames)
      checks.require(
        num_frames <= self.video.max_frames,
        "num_frames",
        "not exceed max_frames",
        num_frames,
      )
      checks.check_divides(
        "group", self.video.group, "num_questions", num_questions
      )
    labels = list(self.points)
    checks.require(
      len(set(labels)) == len(labels) and DENSE not in labels,
      "sweeps",
      f"have one label each, and none {DENSE!r}",
      labels,
    )
    for label, (sweep, _) in self.points.items():
      for site in sweep.sites:
        self.pattern(label, site)
    if self.mask_label:
      checks.check_choice("mask_label", self.mask_label, labels)

  @property
  def all_sweeps(self) -> tuple[Sweep, ...]:
    """`sweeps`, built."""
    return tuple(
      _sweep(values, f"config.sweeps[{i}]")
      for i, values in enumerate(self.sweeps)
    )

  @property
  def points(self) -> dict[str, tuple[Sweep, Any]]:
    """{label: (its sweep, the budget)} of all points."""
    return {
      label: (sweep, budget)
      for sweep in self.all_sweeps
      for label, budget in sweep.points.items()
    }

  @property
  def num_tokens(self) -> int:
    """Tiles of a video that is measured on."""
    return self.num_frames * self.video.num_tiles

  def pattern(self, label: str, site: str) -> attention.Pattern:
    """The pattern of a point, in one of the attentions."""
    sweep, budget = self.points[label]
    blocks = self.self_blocks if site == "self" else self.cross_blocks
    settings = dict(zip(("block_q", "block_kv"), blocks, strict=True))
    settings |= dict(sweep.settings)
    if site == "cross":
      settings |= dict(sweep.cross_settings)
    if sweep.budget:
      settings[sweep.budget] = budget
    return attention.make_pattern(sweep.method, **settings)

  def attention_fn(self, label: str, site: str) -> attention.AttentionFn:
    """The attention of a point, `DENSE` among them."""
    if label == DENSE:
      return attention.DenseAttention(implementation=self.dense_implementation)
    return attention.SparseAttention(
      pattern=self.pattern(label, site), implementation=self.implementation
    )


def parse(config: Any) -> VisionConfig:
  """Builds the settings; ValueError for an unknown key or a bad value."""
  return flags_and_configs.to_dataclass(VisionConfig, config, name="config")


def _sweep(values: Any, name: str) -> Sweep:
  if not isinstance(values, Mapping) and not hasattr(values, "to_dict"):
    raise ValueError(f"{name} must be a mapping; got {values!r}.")
  values = flags_and_configs.to_dict(values)
  fields = {field.name for field in dataclasses.fields(Sweep)} - {"settings"}
  own = {key: values[key] for key in values.keys() & fields}
  if "cross_settings" in own:
    own["cross_settings"] = tuple(dict(own["cross_settings"]).items())
  own["settings"] = tuple(
    (key, value) for key, value in values.items() if key not in fields
  )
  return flags_and_configs.to_dataclass(Sweep, own, name=name)
