# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer, 4K to 1M tokens, beside every peer, on one GPU.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/default.py --workdir=out/speed
Device:  one H100 or H200, about six minutes.
Expect:  on an H200, TFLOP/s on kept blocks from density 1 to 0.05: 611 to 517
         at 32K (dense: tokamax 611, cuDNN 578), 615 to 569 at 128K; gradients
         487 to 396 at 32K (cuDNN's dense 525):
         results/attention_speed_h200.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.cases = (
    dict(length=4096, backward=True, selection=True),
    dict(length=8192),
    dict(length=32768, backward=True, selection=True),
    dict(length=32768, head_dim=64),
    dict(length=131072, selection=True),
    dict(length=1048576, densities=(0.03,), peers=(), selection=True),
  )
  config.selectors = (dict(method="unisparse", top_p=0.9),)
  return config
