# SPDX-License-Identifier: Apache-2.0
"""Backward passes: dense, at density 0.25, of columns; 32K and 128K.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/backward.py --workdir=out/backward
Device:  one H100 or H200, under a minute.
Expect:  on an H100 at 32K 469 and 498 TFLOP/s on kept blocks at densities 0.25
         and 1 (cuDNN 530), of columns 31 ms; at 128K and 0.25, 490 TFLOP/s:
         results/attention_backward_h100.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.cases = (
    dict(
      length=32768,
      densities=(0.25, 1.0),
      peers=("cudnn",),
      backward=True,
      columns=2048,
    ),
    dict(length=131072, densities=(0.25,), peers=("cudnn",), backward=True),
  )
  config.repeats = 3
  config.group_ms = 40.0
  return config
