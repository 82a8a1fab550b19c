# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels on layers of pylib_12m that read 32,768 tokens of code.

Run:     python -m experiments.attention_accuracy
           --config=configs/attention_accuracy/default.py --workdir=out/accuracy
Device:  one H100 or H200, about a minute.
Expect:  see results/ and TUNING.md beside the kernels.
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
