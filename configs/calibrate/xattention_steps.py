# SPDX-License-Identifier: Apache-2.0
"""XAttention's thresholds by its dynamic programme over heads, 8,192 tokens.

From 0.9 on, each step takes a tenth off one head's threshold, as in the paper;
recall stands for the performance that the paper measures of the model.

Run:     python -m experiments.calibrate
           --config=configs/calibrate/xattention_steps.py --workdir=out/steps
Device:  2 CPU cores, to be measured.
Expect:  to be filled from the first recorded run.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.method = "xattention"
  config.settings = ml_collections.ConfigDict(dict(stride=8))
  config.rule = "lowered_steps"
  config.target_recall = 0.9
  config.budgets = tuple(0.9 * 0.9**step for step in range(10))
  config.compare_rules = True
  config.length = 8192
  config.texts = ("niah_multikey_3", "vt")
  config.test_text = "qa_1"
  config.dense_lengths = ()
  return config
