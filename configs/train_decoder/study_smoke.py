# SPDX-License-Identifier: Apache-2.0
"""The path of `study.py` with a tiny decoder, on a CPU.

Run:     python -m experiments.train_decoder
           --config=configs/train_decoder/study_smoke.py
           --workdir=out/study_smoke/train --config.train.max_seconds=20
Device:  CPU, about two minutes, tokenising among them.
Expect:  a model that answers nothing.
"""

from configs.train_decoder import study


def get_config():
  config = study.get_config()
  config.model.update(
    num_layers=2, embed_dim=32, mlp_dim=32, num_heads=4, head_dim=16
  )
  config.model.max_len = 1024
  config.train.stages = (
    dict(seq_len=256, batch_size=2, steps=12),
    dict(seq_len=1024, batch_size=1, steps=6),
  )
  config.train.update(
    warmup_steps=2, attention="tiled", num_workers=1, log_every=5
  )
  config.train.update(dtype="float32", max_seconds=20.0)
  config.data.update(packages=(), answer_weights=(10.0, 20.0))
  config.eval.update(seq_len=1024, rows=1, task_lens=(1024,), task_rows=1)
  return config
