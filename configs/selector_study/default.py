# SPDX-License-Identifier: Apache-2.0
"""Block scores of the shipped model at 8,192 and 16,384 tokens.

Run:     python -m experiments.selector_study
           --config=configs/selector_study/default.py --workdir=out/study
Device:  2 CPU cores, about 10 minutes; 3 GiB.
Expect:  results/selector_study.json: at 16,384 tokens a recall of 0.95 takes a
         density of 0.42 by UniSparse and 0.33 by a threshold, a mask a head.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.lengths = (8192, 16_384)
  config.texts = ("code", "niah_multikey_3", "vt")
  config.layers = ()
  config.targets = (0.9, 0.95, 0.98)
  config.block = 128
  return config
