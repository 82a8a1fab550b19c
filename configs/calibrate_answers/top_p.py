# SPDX-License-Identifier: Apache-2.0
"""The top_p of each mask that the answers at 2K bear: UniSparse's, or another.

Run:     python -m experiments.calibrate_answers
           --config=configs/calibrate_answers/top_p.py
           --workdir=out/calibrate_answers_top_p
         Of another pattern: --config=configs/calibrate_answers/top_p.py:NAME,
           NAME one of xattention, flexprefill, sample_attention,
           sample_attention_v1, oracle; of random_blocks the density.
Device:  1 CPU core: 62 losses, 4 s each where idle; 9 minutes on a busy one.
Expect:  results/calibrate_answers_top_p_cpu.jsonl: within 0.1 nats density 0.36
         (calibration_answers_top_p.json), within 0.3 nats 0.29; one top_p for
         all heads: 0.79 with 0.99, and 1.6 nats at 0.56 with 0.95. Eight
         prompts are too few: on others it scores 0.87 where dense attention
         has 0.99. Other patterns were not run so.
"""

import ml_collections


def get_config(method: str = "unisparse"):
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.method = method
  config.seed = 1
  config.dtype = "float32"
  config.lengths = (2048,)
  config.tasks = ("niah_multikey_2", "niah_multivalue", "vt", "qa_1")
  config.samples = 2
  config.batch_size = 1
  config.settings = dict(block_q=128, block_kv=64)
  config.scorers = (dict(),)  # nothing beside them
  config.scorer_cost = (0.0,)  # of one scorer it decides nothing
  config.budgets = (0.99, 0.95, 0.85, 0.5, 0.2)
  config.compare_single = True
  config.tolerances = (0.1, 0.3)
  return config
