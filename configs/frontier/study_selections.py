# SPDX-License-Identifier: Apache-2.0
"""Times of UniSparse, XAttention and FlexPrefill with faster selections.

XAttention's scores by the kernel that UniSparse uses instead of XLA's products,
FlexPrefill's mass by a threshold instead of a sort: the same blocks, and the
answers of study_more_prompts.py, in less time. UniSparse's composites are
rounded to bfloat16 and multiplied once.

Run:     python -m experiments.frontier
           --config=configs/frontier/study_selections.py:out/study
           --workdir=out/study/selections
Device:  one H200, two minutes.
Expect:  results/frontier_selections_h200.jsonl, without its one answer a
         length. At 128K XAttention at 0.8 has 2.6x (1.3x before), UniSparse at
         0.85 2.8x, FlexPrefill at 0.8 2.9x (2.6x before).
"""

from configs.frontier import study, study_more_prompts


def get_config(root: str = "out/study"):
  config = study_more_prompts.get_config(root)
  sweeps = {sweep["label"]: sweep for sweep in study.get_config(root).sweeps}
  measure = ("attention_time",)
  config.sweeps = (
    dict(sweeps["unisparse"], values=(0.85, 0.9), measure=measure),
    dict(sweeps["xattention"], values=(0.8, 0.9), measure=measure),
    dict(sweeps["flexprefill"], values=(0.8, 0.9), measure=measure),
  )
  config.tasks = ("vt",)  # Dense answers come first, whatever is measured.
  config.samples = 1
  config.reference_measure = ("answers",)
  config.lengths = (131_072, 65_536, 32_768)
  return config
