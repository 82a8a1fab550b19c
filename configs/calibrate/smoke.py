# SPDX-License-Identifier: Apache-2.0
"""UniSparse's top_p for each layer and key head at 768 tokens.

Run:     python -m experiments.calibrate
           --config=configs/calibrate/smoke.py --workdir=out/calibrate_smoke
Device:  CPU, under a minute.
Expect:  a file whose settings mean nothing: the text is too short.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.method = "unisparse"
  config.settings = ml_collections.ConfigDict(dict(block_q=64, block_kv=64))
  config.rule = "equal_recall"
  config.target_recall = 0.9
  config.budgets = (0.5, 0.8, 0.95)
  config.candidates = (("a_shape", 32, 64), ("vertical_slash", 30, 60))
  config.length = 768
  config.texts = ("code",)
  config.test_text = "niah_single_1"
  config.dense_lengths = (256, 768)
  return config
