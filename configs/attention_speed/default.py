# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer, 4K to 1M tokens, beside every peer, on one GPU.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/default.py --workdir=out/speed
Device:  one H100 or H200, about six minutes.
Expect:  see results/ and the README.
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
