# SPDX-License-Identifier: Apache-2.0
"""The study model goes on: five minutes more, most of them at 131,072 tokens.

30 steps at 128K left it answering a third to two thirds of what it does at 64K
(results/train_study_h100.jsonl), too little to tell patterns apart there.

Run:     python -m experiments.train_decoder
           --config=configs/train_decoder/study_long.py
           --workdir=out/study_long/train
           --config.initial=out/study/train/model
         or TRAIN_CONFIG=configs/train_decoder/study_long.py scripts/study.sh
Device:  one H100, 7 minutes: about 140 steps at 128K (2.1 s a step).
Expect:  to be filled from the first recorded run.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.initial = "out/study/train/model"
  config.model = dict(
    vocab_size=4096,
    num_layers=8,
    embed_dim=512,
    mlp_dim=1536,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    max_len=131_072,
    rope_theta=2e6,
    qk_norm=True,
  )
  config.train = dict(
    # Shares of all tokens, hence of the time: 5, 15 and 80%.
    stages=(
      dict(seq_len=8192, batch_size=8, steps=200),
      dict(seq_len=32_768, batch_size=2, steps=600),
      dict(seq_len=131_072, batch_size=1, steps=1600),
    ),
    seed=1,
    learning_rate=7e-4,
    warmup_steps=60,
    schedule="wsd",
    decay_fraction=0.6,
    final_lr_fraction=0.03,
    optimizer="adamw",
    weight_decay=0.1,
    z_loss=1e-5,
    dtype="bfloat16",
    attention="cudnn",
    checkpoint_every=2000,
    eval_every=0,
    log_every=50,
    num_workers=10,
    prefetch=2,
    max_seconds=400.0,
    fit_budget=True,
  )
  config.data = dict(
    seed=1,  # Other rows.
    tokenizer="pylib_12m",
    cache="",  # A folder that `data.build_cache` wrote replaces the sources.
    packages=(
      *("torch", "transformers", "jax", "scipy", "sklearn", "sympy", "pandas"),
      *("numpy", "numba", "networkx", "matplotlib", "flax", "optax"),
    ),
    extra_directories=(),
    # A row has at most 24 questions a document: 4% of the tokens are answers at
    # 2K, 0.3% at 128K.
    answer_weights=(10.0, 20.0, 60.0),
    # That of the shipped model, but half as much code: fewer tokens in all,
    # and the tables are of the tasks.
    mixture=dict(
      code=3.0,
      niah_single_1=0.3,
      niah_single_2=0.4,
      niah_single_3=0.5,
      niah_multikey_1=0.9,
      niah_multikey_2=1.2,
      niah_multikey_3=1.2,
      niah_multivalue=1.2,
      niah_multiquery=0.9,
      vt=2.2,
      cwe=0.6,
      fwe=0.8,
      qa_1=1.1,
      qa_2=1.0,
    ),
  )
  config.eval = dict(
    seq_len=131_072,
    rows=2,
    batch_size=1,
    task_lens=(32_768, 131_072),
    task_rows=2,
  )
  return config
