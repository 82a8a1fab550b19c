# SPDX-License-Identifier: Apache-2.0
"""Two layers of the study model on a prompt of qa_1, 16K to 128K.

Run:     python -m experiments.capture_attention
           --config=configs/capture_attention/study.py:out/study
           --workdir=out/study/captured
Device:  one H100, half a minute; 1.5 GB on disk.
Expect:  eight files.
"""

import ml_collections


def get_config(root: str = "out/study"):
  config = ml_collections.ConfigDict()
  config.model = f"{root}/train/model"
  config.task = "qa_1"
  config.lengths = (16_384, 32_768, 65_536, 131_072)
  config.layers = (2, 5)
  config.dense_implementation = "cudnn"
  config.dtype = "bfloat16"
  config.seed = 0
  return config
