# SPDX-License-Identifier: Apache-2.0
"""XAttention's thresholds by its dynamic programme over heads, 8,192 tokens.

From 0.9 on, each step takes a tenth off one head's threshold, as in the paper;
recall stands for the performance that the paper measures of the model.

Run:     python -m experiments.calibrate
           --config=configs/calibrate/xattention_steps.py --workdir=out/steps
Device:  2 CPU cores, about 4 minutes, half of it compilation.
Expect:  results/calibration_xattention_steps.json, at recall 0.9 in the mean of
         48 heads; density on what it was chosen on, and on the test text:
           fewest_blocks   0.243, 0.146 (recall there 0.902)
           equal_slope     0.245, 0.148 (0.903)
           lowered_steps   0.275, 0.169 (0.902), mean threshold 0.767
           one threshold   0.287, 0.180 (0.919), 0.9 for all heads, of more
                           recall; between it and 0.81, 0.26 at recall 0.9
         So the paper's search loses: a step is no measure of the blocks that
         it saves, and the cheapest steps are of heads with few to save.
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
