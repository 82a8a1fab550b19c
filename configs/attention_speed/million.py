# SPDX-License-Identifier: Apache-2.0
"""One layer that reads 1,048,576 tokens, with and without its selection.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/million.py --workdir=out/million
Device:  one H100 or H200 (30 GB), about 45 seconds.
Expect:  on an H100 485 ms, with selection 566 ms and 0.5 GiB of temporaries:
         results/attention_targets_h100.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.cases = (
    dict(
      length=1048576,
      densities=(0.03,),
      peers=(),
      selected_densities=(0.03,),
    ),
  )
  # Lists of all 8,192 blocks would take 2 GiB.
  config.attended = dict(method="unisparse", max_blocks=512)
  config.repeats = 3
  return config
