# SPDX-License-Identifier: Apache-2.0
"""The settings of target_155m.py on a tiny decoder, within a minute.

Run:     python -m experiments.train_decoder
           --config=configs/train_decoder/target_smoke.py
           --workdir=out/smoke_target
Device:  CPU, two minutes with the tokenising of the standard library.
Expect:  a loss that falls to about 5 and a model in out/smoke_target/model.
"""

from configs.train_decoder import target_155m


def get_config():
  config = target_155m.get_config()
  config.model.update(
    num_layers=8, embed_dim=64, mlp_dim=128, num_heads=4, head_dim=16
  )
  config.train.update(
    stages=(
      dict(seq_len=256, batch_size=4, steps=400),
      dict(seq_len=512, batch_size=2, steps=50),
    ),
    learning_rate=5e-3,
    warmup_steps=5,
    dtype="float32",
    attention="xla",
    num_workers=2,
    max_seconds=60.0,
  )
  config.data.packages = ()
  config.eval.update(seq_len=256, rows=2, batch_size=2)
  return config
