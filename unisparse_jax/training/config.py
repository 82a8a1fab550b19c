# SPDX-License-Identifier: Apache-2.0
"""Settings of a training run: stages, optimizer, cadence, input workers."""

import dataclasses
import math

import jax.numpy as jnp

SCHEDULES = ("cosine", "wsd")
OPTIMIZERS = ("adamw", "muon")
ATTENTION_IMPLEMENTATIONS = ("cudnn", "xla", "tiled", None)
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}

# Fields that change when and where a run works, not which parameters it ends
# with: they may differ when a run is resumed.
RUN_CONTROL_FIELDS = (
  "attention",
  "checkpoint_every",
  "eval_every",
  "keep_checkpoints",
  "log_every",
  "max_seconds",
  "num_workers",
  "prefetch",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """One part of the length curriculum.

  Attributes:
    seq_len: tokens predicted per row; a row holds seq_len + 1 tokens.
    batch_size: rows per step.
    steps: optimizer steps in this stage.
  """

  seq_len: int
  batch_size: int
  steps: int

  def __post_init__(self):
    for name in ("seq_len", "batch_size", "steps"):
      check_count(name, getattr(self, name), least=1)

  @property
  def tokens_per_step(self) -> int:
    return self.seq_len * self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Settings of `train`.

  Attributes:
    stages: the length curriculum, in order.
    learning_rate: peak of the schedule, reached after warmup_steps.
    warmup_steps: linear warm-up from 0.
    schedule: "cosine" or "wsd" (warm-up, stable, linear decay), over the
      steps of all stages together.
    decay_fraction: part of all steps in the decay of "wsd".
    final_lr_fraction: learning rate at the last step over the peak.
    optimizer: "adamw", or "muon" for the matrices of the blocks with AdamW
      for everything else.
    weight_decay: decoupled; on arrays of two or more axes only.
    adam_b1: decay of AdamW's first moment.
    adam_b2: decay of AdamW's second moment.
    muon_beta: momentum of Muon.
    clip_norm: global gradient norm above which gradients are scaled down.
    z_loss: coefficient of mean(lse(logits) ** 2), nats; 0 turns it off.
    seed: parameters are drawn from it.
    dtype: of the computation, "bfloat16" or "float32"; parameters and
      optimizer state are float32 always.
    remat: recompute each block in the backward pass.
    attention: "cudnn", "xla", "tiled" or None (see `attention.DenseAttention`).
    checkpoint_every: steps.
    keep_checkpoints: newest ones kept on disk.
    eval_every: steps; 0 evaluates at the end only.
    log_every: steps per line of metrics.
    num_workers: processes that make rows; 0 makes them in this process.
    prefetch: batches made ahead by each worker.
    max_seconds: wall-clock budget of one call of `train`, compilation
      included; None has no limit.
    fit_budget: finish within max_seconds whatever the speed: the schedule and
      the stages go by the larger of the shares of tokens and of time that are
      used up, so that the learning rate decays fully and every stage gets its
      share. The result then depends on the machine.
  """

  stages: tuple[Stage, ...]
  learning_rate: float = 1.5e-3
  warmup_steps: int = 100
  schedule: str = "cosine"
  decay_fraction: float = 0.2
  final_lr_fraction: float = 0.0
  optimizer: str = "adamw"
  weight_decay: float = 0.1
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  muon_beta: float = 0.95
  clip_norm: float = 1.0
  z_loss: float = 0.0
  seed: int = 0
  dtype: str = "bfloat16"
  remat: bool = False
  attention: str | None = None
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  eval_every: int = 0
  log_every: int = 20
  num_workers: int = 0
  prefetch: int = 4
  max_seconds: float | None = None
  fit_budget: bool = False

  def __post_init__(self):
    stages = self.stages
    if not isinstance(stages, tuple) or not stages:
      raise ValueError(
        f"stages must be a non-empty tuple of Stage; got stages={stages!r}."
      )
    for stage in stages:
      if not isinstance(stage, Stage):
        raise ValueError(f"stages must hold Stage values; got {stage!r}.")
    check_number("learning_rate", self.learning_rate, above=0.0)
    check_number("weight_decay", self.weight_decay, least=0.0)
    check_number("clip_norm", self.clip_norm, above=0.0)
    check_number("z_loss", self.z_loss, least=0.0)
    check_number("decay_fraction", self.decay_fraction, above=0.0, most=1.0)
    check_number(
      "final_lr_fraction", self.final_lr_fraction, least=0.0, most=1.0
    )
    for name in ("adam_b1", "adam_b2", "muon_beta"):
      check_number(name, getattr(self, name), least=0.0, below=1.0)
    if self.max_seconds is not None:
      check_number("max_seconds", self.max_seconds, above=0.0)
    for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
      check_count(name, getattr(self, name), least=1)
    for name in ("warmup_steps", "eval_every", "num_workers", "seed"):
      check_count(name, getattr(self, name), least=0)
    check_count("prefetch", self.prefetch, least=1)
    check_choice("schedule", self.schedule, SCHEDULES)
    check_choice("optimizer", self.optimizer, OPTIMIZERS)
    check_choice("dtype", self.dtype, tuple(DTYPES))
    check_choice("attention", self.attention, ATTENTION_IMPLEMENTATIONS)
    if self.fit_budget and self.max_seconds is None:
      raise ValueError(
        "max_seconds must be given with fit_budget; got max_seconds=None."
      )
    if self.warmup_steps >= self.total_steps:
      raise ValueError(
        "warmup_steps must be less than the steps of all stages; got "
        f"warmup_steps={self.warmup_steps}, total_steps={self.total_steps}."
      )

  @property
  def total_steps(self) -> int:
    return sum(stage.steps for stage in self.stages)

  @property
  def total_tokens(self) -> int:
    return sum(stage.steps * stage.tokens_per_step for stage in self.stages)

  def stage_of(self, step: int) -> int:
    """Index of the stage that runs step `step`, counted from 0."""
    for index, stage in enumerate(self.stages):
      if step < stage.steps:
        return index
      step -= stage.steps
    return len(self.stages) - 1

  def first_step(self, stage_index: int) -> int:
    """First step of a stage; past the last stage, the number of steps."""
    return sum(stage.steps for stage in self.stages[:stage_index])

  def tokens_after(self, step: int) -> int:
    """Tokens seen once `step` steps are done."""
    tokens = 0
    for stage in self.stages:
      done = min(step, stage.steps)
      tokens += done * stage.tokens_per_step
      step -= done
    return tokens


def check_count(name: str, value, *, least: int):
  """Raises ValueError unless `value` is an integer >= least."""
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(
      f"{name} must be an integer >= {least}; got {name}={value!r}."
    )


def check_number(name, value, *, above=None, least=None, below=None, most=None):
  """Raises ValueError unless `value` is finite and within the limits."""
  limits = (
    ("> ", above, lambda v, limit: v > limit),
    (">= ", least, lambda v, limit: v >= limit),
    ("< ", below, lambda v, limit: v < limit),
    ("<= ", most, lambda v, limit: v <= limit),
  )
  wanted = [
    (sign, limit, holds) for sign, limit, holds in limits if limit is not None
  ]
  ok = (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
    and all(holds(value, limit) for _, limit, holds in wanted)
  )
  if not ok:
    rule = " and ".join(f"{sign}{limit:g}" for sign, limit, _ in wanted)
    raise ValueError(
      f"{name} must be a finite number {rule}; got {name}={value!r}."
    )


def check_choice(name: str, value, choices: tuple):
  """Raises ValueError unless `value` is one of `choices`."""
  if value not in choices:
    raise ValueError(f"{name} must be one of {choices}; got {name}={value!r}.")
