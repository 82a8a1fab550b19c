# SPDX-License-Identifier: Apache-2.0
"""UniSparse's top_p by layer and key head that the answers at 2K bear.

Run:     python -m experiments.calibrate_answers
           --config=configs/calibrate_answers/unisparse.py
           --workdir=out/calibrate_answers_unisparse
         By query head: --config.method=xattention (or flexprefill,
           sample_attention, sample_attention_v1, oracle)
           --config.settings='{}' --config.scorers='({},)'
Device:  1 CPU core.
Expect:  to be filled.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.method = "unisparse"
  config.seed = 1
  config.dtype = "float32"
  config.lengths = (2048,)
  config.tasks = ("niah_multikey_2", "niah_multivalue", "vt", "qa_1")
  config.samples = 2
  config.batch_size = 1
  config.settings = ml_collections.ConfigDict(
    dict(window_q=16, window_kv=16, block_q=128, block_kv=64)
  )
  config.scorers = (dict(head_group=None),)
  config.scorer_cost = (0.006,)
  config.budgets = (0.99, 0.95, 0.85, 0.5, 0.2)
  config.compare_single = True
  config.tolerances = (0.1, 0.3)
  return config
