# SPDX-License-Identifier: Apache-2.0
"""One short prompt of every text, greedy.

Run:     python -m experiments.lookup_drafters
           --config=configs/lookup_drafters/smoke.py --workdir=out/lookup_smoke
Device:  CPU, under a minute.
Expect:  a table; its times mean little.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.texts = ("code", "table")
  config.prompts = 1
  config.prompt_len = 64
  config.new_tokens = 16
  config.temperatures = (0.0,)
  config.repeats = 1
  config.seed = 0
  return config
