# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels on layers of pylib_12m that read 32,768 tokens of code.

Run:     python -m experiments.attention_accuracy
           --config=configs/attention_accuracy/default.py --workdir=out/accuracy
Device:  one H100 or H200, about a minute.
Expect:  errors of out 1.8e-3, dq 5.5e-3 to 7.0e-3, dk 3.1e-3, dv 2.3e-3 at
         densities of 0.07 to 0.56, on both cards the same to three digits:
         results/attention_accuracy_{h100,h200}.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.length = 32768
  config.layers = (0, 3, 7)
  config.patterns = (
    dict(method="unisparse", top_p=0.95),
    dict(method="streaming"),
  )
  return config
