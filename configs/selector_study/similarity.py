# SPDX-License-Identifier: Apache-2.0
"""Heads that share a mask by similarity of their scores, or by key head.

Groups are chosen on a text of niah_multikey_3 and judged on others.

Run:     python -m experiments.selector_study
           --config=configs/selector_study/similarity.py --workdir=out/similar
Device:  2 CPU cores, a minute.
Expect:  results/selector_study_similarity.json, density at recall 0.95 by top-p
         and by a threshold, of 3 heads with one mask:
           composite of a key head's 3     0.376, 0.316
           mean score of a key head's 3    0.363, 0.308
           mean score of 3 similar ones    0.361, 0.302
           a mask a head                   0.342, 0.286
         So similarity gains 1 to 2%, with groups that cross key heads in five
         of eight layers: these have no common composite, hence must score each
         head, and a mask for each head is then better still. Not kept.
"""

from configs.selector_study import default


def get_config():
  config = default.get_config()
  config.lengths = (8192,)
  config.texts = ("code", "vt")
  config.group_text = "niah_multikey_3"
  return config
