# SPDX-License-Identifier: Apache-2.0
"""More prompts at 131,072 tokens where 8 a task do not separate patterns.

One lost prompt of 32 is 3% of the score, which decides alone whether a budget
keeps 99%. Here every budget is measured, not searched for.

Run:     python -m experiments.frontier
           --config=configs/frontier/study_more_prompts.py:out/study
           --workdir=out/study/more_prompts
Device:  one H100 or H200, seven minutes; the answers come first.
Expect:  in 200 s of an H200 the answers of all but sample v1: MInference 100%
         of dense, one threshold of 2 102%, UniSparse at 0.85 99.3%, at 0.8 98%;
         results/frontier_more_prompts_h200.jsonl.
"""

from configs.frontier import study

_VALUES = {
  "one threshold": ((8.0, 8.0), (4.0, 4.0), (2.0, 2.0)),
  "unisparse": (0.8, 0.85),
  "minference": ((("vertical_slash", 500, 700),),),
  "sample v1": (0.8,),
}


def get_config(root: str = "out/study"):
  config = study.get_config(root)
  sweeps = {sweep["label"]: sweep for sweep in config.sweeps}
  config.sweeps = tuple(
    dict(sweeps[label], values=values) for label, values in _VALUES.items()
  )
  config.lengths = (131_072,)
  config.search = False
  config.samples = 24
  config.max_seconds = 240.0
  return config
