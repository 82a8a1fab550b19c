# SPDX-License-Identifier: Apache-2.0
"""Training: `train(TrainConfig(...), DecoderConfig(...), make_source, dir)`."""

from unisparse_jax.training import head_config as head_config
from unisparse_jax.training.checkpoints import Checkpoints as Checkpoints
from unisparse_jax.training.config import (
  RUN_CONTROL_FIELDS as RUN_CONTROL_FIELDS,
)
from unisparse_jax.training.config import Stage as Stage
from unisparse_jax.training.config import TrainConfig as TrainConfig
from unisparse_jax.training.evaluation import answer_accuracy as answer_accuracy
from unisparse_jax.training.evaluation import (
  loss_by_position as loss_by_position,
)
from unisparse_jax.training.evaluation import position_edges as position_edges
from unisparse_jax.training.evaluation import unigram_entropy as unigram_entropy
from unisparse_jax.training.export import export as export
from unisparse_jax.training.head_config import (
  HeadTrainConfig as HeadTrainConfig,
)
from unisparse_jax.training.head_loop import HeadResult as HeadResult
from unisparse_jax.training.head_loop import train_head as train_head
from unisparse_jax.training.loop import TrainResult as TrainResult
from unisparse_jax.training.loop import check_initial as check_initial
from unisparse_jax.training.loop import train as train
from unisparse_jax.training.metrics import read_metrics as read_metrics
from unisparse_jax.training.own_texts import TextGroup as TextGroup
from unisparse_jax.training.own_texts import load_groups as load_groups
from unisparse_jax.training.own_texts import save_groups as save_groups
from unisparse_jax.training.own_texts import write_texts as write_texts
