# SPDX-License-Identifier: Apache-2.0
"""A head for a tiny decoder, a few steps, to see that everything works.

Run:     python -m experiments.train_draft_head
           --config=configs/train_draft_head/smoke.py --workdir=out/smoke_head
           --config.target=out/smoke/model
           --config.corpus=out/smoke/data/corpus
         after configs/train_decoder/smoke.py into out/smoke.
Device:  CPU, under a minute.
Expect:  a loss that falls; nothing is learnt.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
  config = ml_collections.ConfigDict()
  config.target = "pylib_12m"
  config.corpus = ""
  config.texts = dict(
    groups=(
      dict(
        name="short",
        domains=("code", "docs", "word_problems", "tables"),
        rows=8,
        batch_size=8,
        min_prompt_len=8,
        prompt_len=32,
        new_tokens=32,
      ),
    ),
    seed=0,
    temperatures=(0.0, 1.0),
    max_seconds=config_dict.placeholder(float),
    num_processes=1,
  )
  config.head = dict(
    tap_layers=(), mlp_dim=0, norm_before_fusion=False, feed_back_normed=False
  )
  config.train = dict(
    steps=6,
    batch_tokens=256,
    num_unrolled=3,
    dtype="float32",
    attention="xla",
    held_out=0.0,
    checkpoint_every=3,
    log_every=2,
    max_seconds=config_dict.placeholder(float),
  )
  return config
