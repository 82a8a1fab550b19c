# SPDX-License-Identifier: Apache-2.0
"""MInference's per-head search: the candidate that keeps most of each head.

Sizes are those of the released search over 30K tokens, scaled to 8,192.

Run:     python -m experiments.calibrate
           --config=configs/calibrate/minference.py --workdir=out/minference
         By output error: --config.rule=minference_error
Device:  2 CPU cores, about 3 minutes.
Expect:  both rules choose the same, results/calibration_minference.json and
         ..._error.json: vertical and slash lines (250, 1000) in 46 of 48 heads,
         25 blocks a row in two (layer 4 head 0, layer 6 head 1). Mean recall of
         the candidates, in the order below: 0.69, 0.81, 0.80, 0.80, 0.64, 0.96,
         0.88 (..._cpu.jsonl). On qa_1 density 0.558, recall 0.979.
         The search does not weigh what a candidate costs, and scaled to 8,192
         tokens these cost different shares: the fullest wins nearly everywhere,
         so the found heads say little, and experiments elsewhere give one size
         to all heads.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.method = "minference"
  config.settings = ml_collections.ConfigDict()
  config.rule = "minference_recall"
  config.candidates = (
    ("a_shape", 32, 256),
    ("vertical_slash", 30, 200),
    ("vertical_slash", 50, 190),
    ("vertical_slash", 125, 175),
    ("vertical_slash", 875, 50),
    ("vertical_slash", 250, 1000),
    ("block_sparse", 25, 0),
  )
  config.length = 8192
  config.texts = ("niah_multikey_3",)
  config.test_text = "qa_1"
  config.dense_lengths = ()
  return config
