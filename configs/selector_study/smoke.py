# SPDX-License-Identifier: Apache-2.0
"""Every variant on the first layers at 1,024 tokens.

Run:     python -m experiments.selector_study
           --config=configs/selector_study/smoke.py --workdir=out/study_smoke
Device:  CPU, under two minutes.
Expect:  a table; 8 blocks are too few for its numbers to mean much.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.lengths = (1024,)
  config.texts = ("code", "vt")
  config.layers = (0, 1)
  config.targets = (0.9, 0.95, 0.98)
  config.block = 128
  return config
