# SPDX-License-Identifier: Apache-2.0
"""Thresholds by layer and key head that the study model's answers at 32K bear.

Run:     python -m experiments.calibrate_answers
           --config=configs/calibrate_answers/study.py:out/study
           --workdir=out/study/calibration
Device:  one H100, two minutes; heads that max_seconds does not reach keep the
         fullest budget.
Expect:  96 heads in 90 s; within 0.2 nats 0.22 of the blocks on the 20 prompts;
         on others at 64K it took 0.72 to keep the scores (20 prompts are too
         few for 16 heads): results/calibrate_answers_study_h100.jsonl.
"""

import ml_collections


def get_config(root: str = "out/study"):
  config = ml_collections.ConfigDict()
  config.model = f"{root}/train/model"
  config.seed = 1
  config.dtype = "bfloat16"
  config.lengths = (32_768,)
  config.tasks = ("niah_multikey_2", "niah_multivalue", "vt", "qa_1", "qa_2")
  config.samples = 4
  config.batch_size = 4
  config.settings = dict(
    over_queries="max",
    head_group=None,
    num_local_blocks=2,
    block_q=128,
    block_kv=64,
  )
  # One scorer, so that one program serves all layers.
  config.scorers = (dict(window_q=8, window_kv=8),)
  config.scorer_cost = (0.02,)
  config.budgets = (0.6, 1.2, 2.5, 5.0, 12.0, 40.0)
  config.tolerances = (0.2, 0.5, 1.5)
  config.implementation = "mosaic_gpu"
  config.max_seconds = 90.0
  return config
