# SPDX-License-Identifier: Apache-2.0
"""Draft head of the 155M target: its own text of five domains, 5-step test.

Run:     python -m experiments.train_draft_head
           --config=configs/train_draft_head/default.py --workdir=out/head
         after configs/train_decoder/target_155m.py into out/target.
Device:  one H100, about 2 minutes of writing and 4 of training.
Expect:  to be filled from the first recorded run.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
  config = ml_collections.ConfigDict()
  config.target = "out/target/model"
  config.corpus = "out/target/data/corpus"
  config.texts = dict(
    groups=(
      dict(
        name="short",
        domains=("code", "docs", "word_problems", "tables"),
        rows=16_384,
        batch_size=512,
        min_prompt_len=32,
        prompt_len=256,
        new_tokens=384,
        time_share=3.0,
      ),
      dict(
        name="long",
        domains=("long_context", "code", "long_context", "docs"),
        rows=1536,
        batch_size=128,
        min_prompt_len=640,
        prompt_len=1792,
        new_tokens=256,
      ),
    ),
    seed=0,
    temperatures=(0.0, 0.0, 0.6, 1.0),
    max_seconds=120.0,
    num_processes=config_dict.placeholder(int),
  )
  config.head = dict(
    tap_layers=(),  # The published choice for the target's depth.
    mlp_dim=0,  # The target's.
    norm_before_fusion=False,
    feed_back_normed=False,
  )
  config.train = dict(
    steps=4000,
    batch_tokens=32_768,
    num_unrolled=5,
    decay=0.8,
    learning_rate=1e-3,
    warmup_fraction=0.02,
    final_lr_fraction=0.05,
    clip_norm=0.5,
    seed=0,
    dtype="bfloat16",
    attention="cudnn",
    held_out=0.02,
    checkpoint_every=500,
    log_every=50,
    max_seconds=230.0,
  )
  return config
