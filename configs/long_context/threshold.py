# SPDX-License-Identifier: Apache-2.0
"""Task scores of the threshold beside dense attention, few prompts, a CPU.

Run:     python -m experiments.long_context
           --config=configs/long_context/threshold.py --workdir=out/threshold
         For 16K tokens: --config.lengths="(16384,)"
Device:  2 CPU cores, 8 minutes at 8,192 tokens.
Expect:  results/long_context_threshold_cpu.jsonl.
"""

from configs.long_context import default

_LABEL = "threshold 0.8"


def get_config():
  config = default.get_config()
  config.lengths = (8192,)
  config.reference_measure = ("answers",)
  config.patterns = tuple(
    {**pattern, "measure": ("answers",)}
    for pattern in config.patterns
    if pattern["label"] == _LABEL
  )
  config.samples = 3
  config.quality_layers = (0,)
  config.mask_layers = ()
  config.mask_label = ""
  return config
