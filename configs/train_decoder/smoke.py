# SPDX-License-Identifier: Apache-2.0
"""A tiny decoder for a few steps, to see that everything works.

Run:     python -m experiments.train_decoder
           --config=configs/train_decoder/smoke.py --workdir=out/smoke
Device:  CPU, under a minute; most of it tokenises the standard library.
Expect:  a loss below 8.4 that falls; nothing is learnt.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
  config = ml_collections.ConfigDict()
  config.initial = ""  # Or the folder of a model to begin with.
  config.model = dict(
    vocab_size=512,
    num_layers=2,
    embed_dim=32,
    mlp_dim=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_len=1024,
    qk_norm=True,
  )
  config.train = dict(
    stages=(
      dict(seq_len=128, batch_size=4, steps=12),
      dict(seq_len=256, batch_size=2, steps=8),
    ),
    seed=0,
    learning_rate=1e-2,
    warmup_steps=4,
    dtype="float32",
    attention="xla",
    checkpoint_every=5,
    log_every=5,
    num_workers=0,
    max_seconds=config_dict.placeholder(float),
  )
  config.data = dict(seed=0, packages=(), extra_directories=(), mixture=dict())
  config.eval = dict(
    seq_len=256, rows=4, batch_size=2, task_lens=(1024,), task_rows=2
  )
  return config
