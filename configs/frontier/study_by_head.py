# SPDX-License-Identifier: Apache-2.0
"""MInference with the heads that its search chose, on more prompts.

Run, after configs/calibrate/minference_study.py:
         python -m experiments.frontier
           --config=configs/frontier/study_by_head.py:out/study
           --workdir=out/study/by_head
Device:  one H200, three minutes.
Expect:  100.0% of dense at 32K, 64K and 128K at densities 0.60, 0.45 and 0.30;
         0.78x, 1.07x and 1.84x of cuDNN's speed;
         results/frontier_by_head_h200.jsonl.
"""

from configs.frontier import study, study_more_prompts

_FILE = "minference/calibration.json"


def get_config(root: str = "out/study"):
  config = study_more_prompts.get_config(root)
  sweep = dict(label="minference by head", method="calibrated")
  sweep |= dict(file=f"{root}/{_FILE}", measure=study.TASKS)
  config.sweeps = (sweep,)
  return config
