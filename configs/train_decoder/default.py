# SPDX-License-Identifier: Apache-2.0
"""The shipped decoder: 11.8M parameters, up to 32,768 tokens.

Run:     python -m experiments.train_decoder
           --config=configs/train_decoder/default.py --workdir=out/decoder
         The same command goes on after a stop; max_seconds bounds one call.
Device:  one H100 and 16 CPU cores, 20 minutes.
Expect:  to be filled from the first recorded run.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.initial = ""  # Or the folder of a model to begin with.
  config.model = dict(
    vocab_size=4096,
    num_layers=8,
    embed_dim=384,
    mlp_dim=768,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    max_len=32_768,
    rope_theta=5e5,
    qk_norm=True,
  )
  config.train = dict(
    stages=(  # 131,072 tokens a step
      dict(seq_len=2048, batch_size=64, steps=4800),
      dict(seq_len=8192, batch_size=16, steps=2600),
      dict(seq_len=16_384, batch_size=8, steps=1100),
      dict(seq_len=32_768, batch_size=4, steps=320),
    ),
    seed=0,
    learning_rate=1.5e-3,
    warmup_steps=200,
    schedule="wsd",
    decay_fraction=0.3,
    final_lr_fraction=0.02,
    optimizer="adamw",
    weight_decay=0.1,
    z_loss=1e-5,
    dtype="bfloat16",
    attention="cudnn",
    checkpoint_every=2000,
    eval_every=0,
    log_every=50,
    num_workers=8,
    prefetch=4,
    max_seconds=1500.0,
  )
  config.data = dict(
    seed=0,
    # Beside the standard library; corpus.txt says how to fill the folder.
    packages=(),
    extra_directories=("corpus",),
    mixture=dict(
      code=6.0,
      niah_single_1=0.3,
      niah_single_2=0.4,
      niah_single_3=0.5,
      niah_multikey_1=0.9,
      niah_multikey_2=1.2,
      niah_multikey_3=1.2,
      niah_multivalue=1.2,
      niah_multiquery=0.9,
      vt=2.2,
      cwe=1.8,
      fwe=1.5,
      qa_1=1.1,
      qa_2=1.6,
    ),
  )
  config.eval = dict(
    seq_len=32_768,
    rows=8,
    batch_size=4,
    task_lens=(8192, 16_384),
    task_rows=8,
  )
  return config
