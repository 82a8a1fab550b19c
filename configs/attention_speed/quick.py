# SPDX-License-Identifier: Apache-2.0
"""The sizes that the README quotes, on one GPU.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/quick.py --workdir=out/speed
Device:  one H100 or H200, about three minutes.
Expect:  on an H100 629 to 656 TFLOP/s at 32K and density 0.25, beside 420 of
         FlexAttention: results/attention_speed_h100.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.cases = (
    dict(length=32768, densities=(1.0, 0.25, 0.1), backward=True),
    dict(length=32768, head_dim=64, densities=(1.0, 0.25)),
    dict(length=131072, densities=(1.0, 0.25, 0.1)),
    dict(length=4096, densities=(1.0, 0.25)),
  )
  config.repeats = 3
  config.group_ms = 30.0
  return config
