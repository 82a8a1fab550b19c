# SPDX-License-Identifier: Apache-2.0
"""More prompts at 16K to 128K where 8 a task do not separate patterns.

One lost prompt of 32 is 3% of the score, which decides alone whether a budget
keeps 99%. Here every budget is measured, not searched for; among them are those
that the searches of study.py never asked for.

Run:     python -m experiments.frontier
           --config=configs/frontier/study_more_prompts.py:out/study
           --workdir=out/study/more_prompts
         A length apart, with the same workdir: --config.lengths="(16384,)"
Device:  one H200, a quarter of an hour: 128K 10 minutes, 64K 3, 32K 1, 16K 1
         (called apart); answers of all lengths come before the first clock. A
         call stops after max_seconds; the same one goes on.
Expect:  results/frontier_more_prompts_h200.jsonl. At 128K one threshold of 2
         has 102% of dense at 3.1x, SampleAttention v1 100.2% at 3.4x, UniSparse
         at 0.85 99.3% at 2.8x, MInference 98.7% at 4.6x (100% on another card).
         At 16K a threshold of 4 has 99.3% at 2.7x. Ours with columns, and times
         of faster selections: study_columns.py, study_selections.py.
"""

from configs.frontier import study

_VALUES = {
  "one threshold": tuple((x, x) for x in (8.0, 4.0, 2.0, 1.0)),
  "unisparse": (0.8, 0.85, 0.9),
  "minference": ((("vertical_slash", 500, 700),),),
  "sample v1": (0.8,),
  "flexprefill": (0.8, 0.9, 0.95),
  "xattention": (0.8, 0.9),
  "sample_attention": (0.8,),
  "oracle": (0.9, 0.95, 0.98),  # recall and density, no answers
}


def get_config(root: str = "out/study"):
  config = study.get_config(root)
  sweeps = {sweep["label"]: sweep for sweep in config.sweeps}
  config.sweeps = tuple(
    dict(sweeps[label], values=values) for label, values in _VALUES.items()
  )
  config.lengths = (131_072, 65_536, 32_768)
  config.search = False
  config.samples = 24
  config.max_seconds = 560.0
  return config
