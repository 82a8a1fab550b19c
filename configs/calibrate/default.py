# SPDX-License-Identifier: Apache-2.0
"""UniSparse's top_p by layer and key head, mean recall 0.95, 8,192 tokens.

Run:     python -m experiments.calibrate
           --config=configs/calibrate/default.py --workdir=out/calibrate
         XAttention as released: --config.method=xattention
           --config.rule=xattention_profiler --config.target_recall=0.9
Device:  2 CPU cores, about 5 minutes.
Expect:  results/calibration_unisparse.json; with --config.method=
         unisparse_threshold results/calibration_threshold.json: on qa_1, not
         calibrated on, density 0.230 at recall 0.953; one budget for all
         heads: 0.254 at 0.959.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.method = "unisparse"
  config.settings = ml_collections.ConfigDict()
  config.rule = "equal_slope"
  config.target_recall = 0.95
  config.budgets = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99)
  config.length = 8192
  config.texts = ("code", "niah_multikey_3", "vt")
  config.test_text = "qa_1"
  config.dense_lengths = (1024, 2048, 4096, 8192)
  return config
