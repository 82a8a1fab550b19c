# SPDX-License-Identifier: Apache-2.0
"""Captured layers of the study model, patterns at matched answers.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/captured.py:out/study
           --workdir=out/study/speed
         After capture_attention and frontier on the same folder.
Device:  one H100, about a minute and a half.
Expect:  results/attention_speed_captured_h100.jsonl.
"""

import ml_collections


def get_config(root: str = "out/study"):
  config = ml_collections.ConfigDict()
  config.cases = ()
  config.captured = f"{root}/captured"
  config.captured_model = f"{root}/train/model"
  config.matched = f"{root}/frontier/matched.json"
  config.captured_patterns = ()
  config.repeats = 3
  config.group_ms = 20.0
  return config
