# SPDX-License-Identifier: Apache-2.0
"""Captured layers on a CPU, where times mean little.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/captured_smoke.py:out/study
           --workdir=out/study/speed
         After capture_attention and frontier on the same folder.
Device:  CPU, a minute.
Expect:  a table.
"""

from configs.attention_speed import captured


def get_config(root: str = "out/study"):
  config = captured.get_config(root)
  config.captured_patterns = (
    dict(label="small", method="unisparse", block_q=64, block_kv=64),
  )
  config.captured_dense = "tiled"
  config.dtype = "float32"
  config.implementation = "xla"
  config.repeats = 1
  config.group_ms = 1.0
  return config
