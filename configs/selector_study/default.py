# SPDX-License-Identifier: Apache-2.0
"""Block scores of the shipped model at 8,192 and 16,384 tokens.

Run:     python -m experiments.selector_study
           --config=configs/selector_study/default.py --workdir=out/study
Device:  2 CPU cores, about 20 minutes; 3 GiB.
Expect:  to be filled from the first recorded run.
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
