# SPDX-License-Identifier: Apache-2.0
"""Thresholds by layer and key head that the answers at 8K and 16K bear.

Run:     python -m experiments.calibrate_answers
           --config=configs/calibrate_answers/default.py
           --workdir=out/calibrate_answers
         On a GPU: --config.dtype=bfloat16 --config.batch_size=16
Device:  a GPU for 6 minutes, or 2 CPU cores for a night.
Expect:  results/calibrate_answers_h100.jsonl, with tolerances 0.15 to 0.22: at
         0.2 nats density 0.21 (8K) and 0.19 (16K), as shipped with the model.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 1
  config.dtype = "float32"
  config.lengths = (8192, 16_384)
  config.tasks = (
    "niah_single_3",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "vt",
    "cwe",
    "qa_1",
    "qa_2",
  )
  config.samples = 6
  config.batch_size = 1
  config.settings = dict(
    over_queries="max",
    head_group=None,
    num_local_blocks=2,
    block_q=128,
    block_kv=64,
  )
  config.scorers = (
    dict(window_q=16, window_kv=16),
    dict(window_q=8, window_kv=8),
    dict(window_q=4, window_kv=4),
  )
  # Of dense attention's time, 8,192 tokens, 2 CPU cores.
  config.scorer_cost = (0.006, 0.022, 0.086)
  config.budgets = (0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 12.0, 40.0)
  config.tolerances = (0.06, 0.12, 0.2)
  return config
