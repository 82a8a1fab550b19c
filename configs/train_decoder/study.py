# SPDX-License-Identifier: Apache-2.0
"""The study model: 31.5M parameters, heads of 128, up to 131,072 tokens.

A mask at 16K says little about one at 128K, and the shipped model ends at 32K.
Attention makes 85% of this model's training at 32K, hence 8 layers of 8 query
and 2 key heads. It trains at 128K itself rather than stretching its positions:
a length that a model has not seen is answered at chance (0 of 32 at 8K after
2K), and one that it has comes quickly. RoPE's base leaves a third of the
channels a wavelength beyond 128K, as the shipped model's does beyond 32K.

Run:     python -m experiments.train_decoder
           --config=configs/train_decoder/study.py
           --workdir=out/study/first/train
Device:  one H100 and 16 CPU cores: 10 minutes. The run fits its budget; a stage
         gets the share of the time that its steps have of all tokens.
Expect:  in 457 s of one H100 109M, 32M, 16M and 4M tokens at 2K, 8K, 32K and
         128K (845,000, 48,000 tokens/s at the ends); held-out loss 2.06 nats
         (2.10 beyond 64K); needles at 32K 0.96 to 1, chains of variables 0.33;
         results/train_study_h100.jsonl. 30 steps at 128K are few: there it
         answers a third to two thirds of what it does at 64K.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.initial = ""  # Or the folder of a model to begin with.
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
    # Shares of all tokens, hence of the time: 35, 22, 25 and 18%.
    stages=(
      dict(seq_len=2048, batch_size=32, steps=3680),
      dict(seq_len=8192, batch_size=8, steps=2320),
      dict(seq_len=32_768, batch_size=2, steps=2630),
      dict(seq_len=131_072, batch_size=1, steps=950),
    ),
    seed=0,
    learning_rate=1.5e-3,
    warmup_steps=200,
    schedule="wsd",
    decay_fraction=0.3,
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
    max_seconds=600.0,
    fit_budget=True,
  )
  config.data = dict(
    seed=0,
    tokenizer="pylib_12m",
    cache="",  # A folder that `data.build_cache` wrote replaces the sources.
    packages=(
      *("torch", "transformers", "jax", "scipy", "sklearn", "sympy", "pandas"),
      *("numpy", "numba", "networkx", "matplotlib", "flax", "optax"),
    ),
    extra_directories=(),
    # A row has at most 24 questions a document: 4% of the tokens are answers at
    # 2K, 0.3% at 128K.
    answer_weights=(10.0, 10.0, 20.0, 60.0),
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
    task_lens=(32_768,),
    task_rows=2,
  )
  return config
