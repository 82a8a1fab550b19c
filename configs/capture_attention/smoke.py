# SPDX-License-Identifier: Apache-2.0
"""Two layers of the shipped model at 512 tokens.

Run:     python -m experiments.capture_attention
           --config=configs/capture_attention/smoke.py --workdir=out/captured
Device:  CPU, half a minute.
Expect:  out/captured/512_0.safetensors and 512_1.safetensors.
"""

from configs.capture_attention import study


def get_config(root: str = ""):
  config = study.get_config(root)
  config.model = f"{root}/train/model" if root else "pylib_12m"
  config.lengths = (512,)
  config.layers = (0, 1)
  config.dense_implementation = "tiled"
  config.dtype = "float32"
  return config
