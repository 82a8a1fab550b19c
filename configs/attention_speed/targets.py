# SPDX-License-Identifier: Apache-2.0
"""What the kernels aim at: backward, selection included, columns, short texts.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/targets.py --workdir=out/targets
Device:  one H100 or H200, about three minutes.
Expect:  on an H100 at 128K and density 0.25, 57.9 ms with selection beside 240
         ms of cuDNN; backward at 32K 481 TFLOP/s beside FlexAttention's 375;
         backward of columns 56 ms, since rewritten (31 ms, backward.py):
         results/attention_targets_h100.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  short = dict(peers=("cudnn",), densities=(0.25,), selected_densities=(0.25,))
  config.cases = (
    dict(
      length=131072,
      densities=(0.25, 0.1),
      peers=("cudnn",),
      selection=True,
      selected_densities=(0.25, 0.1),
    ),
    dict(
      length=32768,
      densities=(0.25,),
      peers=("cudnn", "torch_flex"),
      backward=True,
      selection=True,
      selected_densities=(0.25, 0.1),
      columns=2048,
    ),
    *(dict(length=length, **short) for length in (4096, 8192, 16384)),
  )
  config.selectors = (
    dict(method="sample_attention", top_p=0.9),
    dict(method="sample_attention_v1", top_p=0.9, max_columns=4096),
  )
  config.repeats = 5
  config.group_ms = 40.0
  config.torch_timeout_s = 75
  return config
