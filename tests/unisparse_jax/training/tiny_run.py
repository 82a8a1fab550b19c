# SPDX-License-Identifier: Apache-2.0
"""A run of seconds for the tests, and a program that dies on demand.

  python -m tests.unisparse_jax.training.tiny_run WORKDIR DEATH STEP

DEATH is "evaluate" (killed between two steps, a checkpoint being there) or
"save" (killed while a checkpoint is being written).
"""

import os
import pathlib
import signal
import sys
import time

import numpy as np

from unisparse_jax import models, training
from unisparse_jax.training import checkpoints

MODEL = models.DecoderConfig(
  vocab_size=32,
  num_layers=1,
  embed_dim=16,
  mlp_dim=24,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  max_len=64,
)


class Rows:
  """Counting modulo the vocabulary, in steps that each row begins with."""

  def __init__(self, seed: int, seq_len: int):
    self.seed = seed
    self.seq_len = seq_len

  def __len__(self):
    return 1 << 30

  def __getitem__(self, index):
    rng = np.random.default_rng([self.seed, int(index)])
    stride, start = rng.integers(1, 4), rng.integers(32)
    tokens = (start + stride * np.arange(self.seq_len + 1)) % 32
    weights = np.where(np.arange(self.seq_len + 1) < 2, 0.1, 1.0)
    weights[-3:] = 10.0
    return {
      "tokens": tokens.astype(np.int32),
      "loss_weights": weights.astype(np.float32),
    }


def make_source(index: int, stage: training.Stage) -> Rows:
  return Rows(index, stage.seq_len)


def make_config(**changes) -> training.TrainConfig:
  settings = dict(
    stages=(
      training.Stage(seq_len=16, batch_size=4, steps=8),
      training.Stage(seq_len=32, batch_size=2, steps=7),
    ),
    learning_rate=1e-2,
    warmup_steps=3,
    checkpoint_every=4,
    log_every=2,
    dtype="float32",
    attention="xla",
    prefetch=2,
  )
  return training.TrainConfig(**(settings | changes))


def train(workdir, *, evaluate=None, **changes) -> training.TrainResult:
  return training.train(
    make_config(**changes),
    MODEL,
    make_source,
    workdir,
    evaluate=evaluate,
    show_progress=False,
  )


def main(workdir: str, death: str, step: str):
  def evaluate(model, now):
    del model
    if now == int(step) and death == "evaluate":
      while not list((pathlib.Path(workdir) / "checkpoints").glob("[0-9]")):
        time.sleep(1e-3)
      os.kill(os.getpid(), signal.SIGKILL)
    return {}

  class DyingCheckpoints(checkpoints.Checkpoints):
    def save(self, now, state, meta):
      super().save(now, state, meta)
      if death == "save" and now == int(step):
        folder = pathlib.Path(workdir) / "checkpoints"
        for _ in range(1000):
          if list(folder.glob("*tmp*")):
            break
          time.sleep(1e-4)
        os.kill(os.getpid(), signal.SIGKILL)

  checkpoints.Checkpoints = DyingCheckpoints
  train(workdir, evaluate=evaluate, eval_every=1)


if __name__ == "__main__":
  main(*sys.argv[1:])
