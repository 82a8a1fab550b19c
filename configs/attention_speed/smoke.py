# SPDX-License-Identifier: Apache-2.0
"""Every part of the experiment on a CPU, where times mean little.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/smoke.py --workdir=out/speed_smoke
Device:  CPU, a few seconds.
Expect:  a table and a figure.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.cases = (
    dict(
      length=256,
      head_dim=16,
      densities=(1.0, 0.25),
      backward=True,
      peers=("cudnn", "tokamax", "xla_dense"),
      selection=True,
      selected_densities=(0.5,),
      columns=24,
    ),
  )
  config.num_heads = 4
  config.num_kv_heads = 2
  config.num_mask_heads = 2
  config.block = 32
  config.dtype = "float32"
  config.implementation = "xla"
  config.repeats = 2
  config.group_ms = 1.0
  config.attended = dict(method="unisparse", block_q=32, block_kv=32)
  config.selectors = (
    dict(method="unisparse", block_q=32, block_kv=32, top_p=0.9),
  )
  return config
