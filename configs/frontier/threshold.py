# SPDX-License-Identifier: Apache-2.0
"""UniSparse with a threshold beside top-p, 8,192 tokens.

Run:     python -m experiments.frontier
           --config=configs/frontier/threshold.py --workdir=out/threshold
Device:  2 CPU cores, about 5 minutes.
Expect:  results/frontier_threshold.jsonl: KL 0.006 at density 0.29 with
         min_score 0.5, 0.007 at 0.37 with top_p 0.95.
"""

import ml_collections

_MEASURE = ("next_token", "layers")


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.dtype = "float32"
  config.lengths = (8192,)
  config.sweeps = (
    dict(
      label="unisparse",
      method="unisparse",
      budget="top_p",
      values=(0.9, 0.95, 0.98),
      measure=_MEASURE,
    ),
    dict(
      label="unisparse per head",
      method="unisparse",
      head_group=1,
      budget="top_p",
      values=(0.9, 0.95),
      measure=_MEASURE,
    ),
    dict(
      label="unisparse_threshold",
      method="unisparse_threshold",
      budget="min_score",
      values=(1.0, 0.5, 0.3),
      measure=_MEASURE,
    ),
    dict(
      label="xattention 8",
      method="xattention",
      stride=8,
      budget="top_p",
      values=(0.9, 0.95),
      measure=_MEASURE,
    ),
    dict(
      label="oracle",
      method="oracle",
      budget="top_p",
      values=(0.9, 0.95),
      measure=_MEASURE,
    ),
  )
  config.matched_share = 0.99
  config.samples = 1
  config.code_rows = 1
  config.quality_layers = (1, 4, 7)
  config.timed_layers = (1, 4, 6)
  config.implementation = "xla"
  config.dense_implementation = "tiled"
  config.jax_nn_max_len = 0
  config.repeats = 3
  return config
