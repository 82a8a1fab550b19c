# SPDX-License-Identifier: Apache-2.0
"""UniSparse, XAttention and FlexPrefill, after their selections became faster.

XAttention's scores by the kernel that UniSparse uses instead of XLA's products,
FlexPrefill's mass by a threshold instead of two sorts: the same blocks in less
time. UniSparse's composites are rounded to bfloat16 and multiplied once.

Run:     python -m experiments.frontier
           --config=configs/frontier/study_selections.py:out/study
           --workdir=out/study/selections
Device:  one H200, five minutes or so (not run yet).
"""

from configs.frontier import study, study_more_prompts


def get_config(root: str = "out/study"):
  config = study_more_prompts.get_config(root)
  sweeps = {sweep["label"]: sweep for sweep in study.get_config(root).sweeps}
  config.sweeps = (
    dict(sweeps["unisparse"], values=(0.85, 0.9)),
    dict(sweeps["xattention"], values=(0.8, 0.9)),
    dict(sweeps["flexprefill"], values=(0.8, 0.9)),
  )
  config.lengths = (131_072, 65_536, 32_768, 16_384)
  return config
