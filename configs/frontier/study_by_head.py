# SPDX-License-Identifier: Apache-2.0
"""MInference with the heads that its search chose, on study_more's prompts.

Run, after configs/calibrate/minference_study.py:
         python -m experiments.frontier
           --config=configs/frontier/study_by_head.py:out/study
           --workdir=out/study/by_head
Device:  one H100 or H200, two or three minutes.
"""

from configs.frontier import study, study_more_prompts

_FILE = "minference/calibration.json"


def get_config(root: str = "out/study"):
  config = study_more_prompts.get_config(root)
  sweep = dict(label="minference by head", method="calibrated")
  sweep |= dict(file=f"{root}/{_FILE}", measure=study.TASKS)
  config.sweeps = (sweep,)
  return config
