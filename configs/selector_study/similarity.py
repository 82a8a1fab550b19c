# SPDX-License-Identifier: Apache-2.0
"""Heads that share a mask by similarity of their scores, or by key head.

Groups are chosen on a text of niah_multikey_3 and judged on others.

Run:     python -m experiments.selector_study
           --config=configs/selector_study/similarity.py --workdir=out/similar
Device:  2 CPU cores, 3 minutes.
Expect:  to be filled.
"""

from configs.selector_study import default


def get_config():
  config = default.get_config()
  config.lengths = (8192,)
  config.texts = ("code", "vt")
  config.group_text = "niah_multikey_3"
  return config
