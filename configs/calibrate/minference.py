# SPDX-License-Identifier: Apache-2.0
"""MInference's per-head search: the candidate that keeps most of each head.

Sizes are those of the released search over 30K tokens, scaled to 8,192.

Run:     python -m experiments.calibrate
           --config=configs/calibrate/minference.py --workdir=out/minference
         By output error: --config.rule=minference_error
Device:  2 CPU cores, about 10 minutes.
Expect:  to be filled from the first recorded run.
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
