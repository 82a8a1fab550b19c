# SPDX-License-Identifier: Apache-2.0
"""XAttention and FlexPrefill anew, after their selections were made faster.

XAttention's scores by the kernel that UniSparse uses instead of XLA's products,
FlexPrefill's mass by a threshold instead of two sorts: the same blocks, less
time, so that neither loses to the others by what this project did not tune.

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
    dict(sweeps["xattention"], values=(0.8, 0.9)),
    dict(sweeps["flexprefill"], values=(0.8, 0.9)),
  )
  config.lengths = (131_072, 65_536, 32_768, 16_384)
  return config
