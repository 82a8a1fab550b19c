# SPDX-License-Identifier: Apache-2.0
"""MInference's per-head search on the study model, and where dense is faster.

The candidates are those of the released search, at about its length.

Run:     python -m experiments.calibrate
           --config=configs/calibrate/minference_study.py:out/study
           --workdir=out/study/minference
Device:  one H200, a minute and a half.
Expect:  1,000 columns and 4,096 slashes in 63 of 64 heads, 100 blocks in one;
         density 0.60, recall 0.944 on qa_1; dense below 32,769
         (results/calibration_minference_study.json).
"""

from configs.calibrate import minference


def get_config(root: str = "out/study"):
  config = minference.get_config()
  config.model = f"{root}/train/model"
  del config.candidates  # those of the released search, the default
  config.length = 32_768
  config.dense_lengths = (4096, 8192, 16_384, 32_768)
  config.timed_dtype = "bfloat16"
  return config
