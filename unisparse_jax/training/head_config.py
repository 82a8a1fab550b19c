# SPDX-License-Identifier: Apache-2.0
"""Settings of the training of a draft head."""

import dataclasses

from unisparse_jax.training import config as config_lib

RUN_CONTROL_FIELDS = (
  "attention",
  "checkpoint_every",
  "eval_every",
  "keep_checkpoints",
  "log_every",
  "max_seconds",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadTrainConfig:
  """Settings of `train_head`.

  Attributes:
    steps: optimizer steps.
    batch_tokens: tokens of a batch; its rows come from one group of texts.
    num_unrolled: draft steps of the training-time test.
    decay: weight of a draft step over that of the step before.
    top_k: candidates that count as a hit in the metrics.
    learning_rate: peak of a cosine, reached after the warm-up.
    warmup_fraction: share of the steps in the linear warm-up.
    final_lr_fraction: learning rate at the end over the peak.
    weight_decay: of AdamW.
    adam_b1: decay of the first moment.
    adam_b2: decay of the second moment.
    clip_norm: global gradient norm above which gradients are scaled down.
    seed: of the head's weights and of the order of the rows.
    dtype: of the computation; parameters are float32 always.
    attention: of the target and of draft step 0, see `DenseAttention`.
    held_out: share of each group's rows that is evaluated and not trained on.
    eval_batches: batches of an evaluation.
    checkpoint_every: steps.
    keep_checkpoints: newest ones kept on disk.
    eval_every: steps; 0 evaluates at the end only.
    log_every: steps per line of metrics.
    max_seconds: wall-clock budget of one call; the cosine then goes by the
      larger of the shares of steps and of time that are used up. None: no
      limit.
  """

  steps: int
  batch_tokens: int = 32_768
  num_unrolled: int = 5
  decay: float = 0.8
  top_k: int = 10
  learning_rate: float = 1e-3
  warmup_fraction: float = 0.03
  final_lr_fraction: float = 0.05
  weight_decay: float = 0.0
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  clip_norm: float = 0.5
  seed: int = 0
  dtype: str = "bfloat16"
  attention: str | None = None
  held_out: float = 0.02
  eval_batches: int = 4
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  eval_every: int = 0
  log_every: int = 20
  max_seconds: float | None = None

  def __post_init__(self):
    count, number = config_lib.check_count, config_lib.check_number
    for name in (
      "steps",
      "batch_tokens",
      "num_unrolled",
      "top_k",
      "eval_batches",
      "checkpoint_every",
      "keep_checkpoints",
      "log_every",
    ):
      count(name, getattr(self, name), least=1)
    for name in ("seed", "eval_every"):
      count(name, getattr(self, name), least=0)
    for name in ("learning_rate", "clip_norm"):
      number(name, getattr(self, name), above=0.0)
    number("decay", self.decay, above=0.0, most=1.0)
    number("weight_decay", self.weight_decay, least=0.0)
    for name in ("warmup_fraction", "held_out"):
      number(name, getattr(self, name), least=0.0, below=1.0)
    number("final_lr_fraction", self.final_lr_fraction, least=0.0, most=1.0)
    for name in ("adam_b1", "adam_b2"):
      number(name, getattr(self, name), least=0.0, below=1.0)
    if self.max_seconds is not None:
      number("max_seconds", self.max_seconds, above=0.0)
    config_lib.check_choice("dtype", self.dtype, tuple(config_lib.DTYPES))
    config_lib.check_choice(
      "attention", self.attention, config_lib.ATTENTION_IMPLEMENTATIONS
    )
