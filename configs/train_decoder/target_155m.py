# SPDX-License-Identifier: Apache-2.0
"""A deep and thin decoder to decode speculatively: 155.9M parameters.

Deep, because a draft head costs one layer of the target a level.

Run:     python -m experiments.train_decoder
           --config=configs/train_decoder/target_155m.py --workdir=out/target
           --config.train.max_seconds=540
Device:  one H100 or H200 and 16 CPU cores, 9 minutes: the run fits its budget.
         The steps are an upper bound (175M tokens).
Expect:  in 440 s of one H100 85M tokens (266,000 tokens/s), held-out loss 2.06
         nats (unigrams 6.31); results/train_target_155m_h100.jsonl. In 470 s of
         an H200 104M (290,000), 2.08; results/train_target_155m_h200.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.initial = ""  # Or the folder of a model to begin with.
  config.model = dict(
    vocab_size=4096,
    num_layers=32,
    embed_dim=640,
    mlp_dim=1984,
    num_heads=10,
    num_kv_heads=2,
    head_dim=64,
    max_len=8192,
    rope_theta=5e5,
    qk_norm=True,
  )
  config.train = dict(
    # 32,768 tokens a step: four times as many need 100 GB or remat, which
    # costs a quarter of the speed.
    stages=(
      dict(seq_len=2048, batch_size=16, steps=4720),
      dict(seq_len=4096, batch_size=8, steps=620),
    ),
    seed=0,
    learning_rate=8e-4,
    warmup_steps=200,
    schedule="wsd",
    decay_fraction=0.35,
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
    prefetch=4,
    max_seconds=540.0,
    fit_budget=True,
  )
  config.data = dict(
    seed=0,
    tokenizer="pylib_12m",  # That of a model, rather than a new one.
    cache="",  # A folder that `data.build_cache` wrote replaces the sources.
    packages=(
      *("torch", "transformers", "jax", "scipy", "sklearn", "sympy", "pandas"),
      *("numpy", "numba", "networkx", "statsmodels", "matplotlib", "skimage"),
      *("flax", "optax", "timm", "peft", "accelerate", "botorch", "gpytorch"),
    ),
    extra_directories=(),
    mixture=dict(
      code=5.0,
      docs=2.0,
      word_problems=1.0,
      tables=1.0,
      niah_single_1=0.0,
      niah_single_2=0.2,
      niah_single_3=0.0,
      niah_multikey_1=0.3,
      niah_multikey_2=0.6,
      niah_multikey_3=0.0,
      niah_multivalue=0.5,
      niah_multiquery=0.0,
      vt=0.6,
      cwe=0.0,
      fwe=0.0,
      qa_1=0.6,
      qa_2=0.6,
    ),
  )
  config.eval = dict(
    seq_len=4096,
    rows=8,
    batch_size=8,
    task_lens=(),
    task_rows=1,
  )
  return config
