# SPDX-License-Identifier: Apache-2.0
"""Draft head of the 155M target: its own text of five domains, 5-step test.

Run:     python -m experiments.train_draft_head
           --config=configs/train_draft_head/default.py --workdir=out/head
         after configs/train_decoder/target_155m.py into out/target.
Device:  one H100 or H200, about 2 minutes of writing and 3 of training.
Expect:  6.3M own tokens in 120 s; 3,081 steps in 180 s (388,000 tokens/s);
         held out, a chain of 5 accepts 4.5 tokens a call on short texts
         (accuracy 87 to 85%) and 3.6 on long ones, of which only 128 were
         written; results/train_draft_head_h100.jsonl. On an H200 12.9M tokens
         and 3,647 steps in 200 s (435,000): 4.7, and 4.5 on long ones;
         results/train_draft_head_h200.jsonl.
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
        rows=49_152,  # As many as the time allows.
        batch_size=1024,
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
    # The high tap is the last layer's output, and the output layer stays the
    # target's. Held-out loss and accuracy on pylib_12m after 80 small steps:
    # taps 2, L / 2, L - 3: 5.72, 15.9%; 2, 5, L: 5.31, 15.2%; with a shared
    # output layer 5.36, 17.0%, and 5.01, 21.0% at three times the learning rate
    # (with its own 5.14, 16.4%). Norms before the fusion: 5.25, 19.7%.
    tap_layers=(2, 16, 32),
    mlp_dim=0,  # The target's.
    norm_before_fusion=False,
    feed_back_normed=False,
    share_output=True,
  )
  config.train = dict(
    steps=9000,  # An upper bound: the learning rate follows the time.
    batch_tokens=16_384,
    num_unrolled=5,
    decay=0.8,
    learning_rate=2e-3,
    warmup_fraction=0.02,
    final_lr_fraction=0.05,
    clip_norm=0.5,
    seed=0,
    dtype="bfloat16",
    attention="cudnn",
    held_out=0.02,
    checkpoint_every=2000,
    log_every=100,
    max_seconds=230.0,
  )
  return config
