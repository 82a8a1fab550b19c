# SPDX-License-Identifier: Apache-2.0
"""One threshold and the keys that the last queries look at most.

At 128K MInference's 500 columns answer what thresholds of 4 and 8 lose, with no
more of the pairs. So do ours.

Run:     python -m experiments.frontier
           --config=configs/frontier/study_columns.py:out/study
           --workdir=out/study/columns
Device:  one H200, five minutes.
Expect:  results/frontier_columns_h200.jsonl. 500 columns and a threshold of 4
         have 100.0, 99.1, 100.3 and 99.3% of dense at 16K to 128K at 2.2, 4.4,
         6.5 and 6.7x, 16 have 100.0, 99.1, 99.1 and 94.0% at 2.4, 5.3, 11.4 and
         20.0x. 2,000 columns, in an earlier run, are slower and no better.
"""

from configs.frontier import study

_LIMITS = {500: (16.0, 8.0, 6.0, 5.0, 4.0), 250: (5.0,)}


def get_config(root: str = "out/study"):
  config = study.get_config(root)
  ours = next(s for s in config.sweeps if s["label"] == "one threshold")
  config.sweeps = tuple(
    dict(
      ours,
      label=f"and {columns} columns",
      values=tuple((x, x) for x in limits),
      num_columns=columns,
    )
    for columns, limits in _LIMITS.items()
  )
  config.lengths = (131_072, 65_536, 32_768, 16_384)
  config.search = False
  config.samples = 24
  config.max_seconds = 440.0
  return config
