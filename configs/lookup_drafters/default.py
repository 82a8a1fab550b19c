# SPDX-License-Identifier: Apache-2.0
"""Lookup drafters on the shipped model: code, docstrings and a table.

Run:     python -m experiments.lookup_drafters
           --config=configs/lookup_drafters/default.py --workdir=out/lookup
Device:  CPU, about two minutes.
Expect:  identical output everywhere, and fewer target calls than tokens.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.texts = ("code", "docstrings", "table")
  config.prompts = 4
  config.prompt_len = 384
  config.new_tokens = 128
  config.temperatures = (0.0, 1.0)
  config.repeats = 3
  config.seed = 0
  return config
