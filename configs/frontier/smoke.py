# SPDX-License-Identifier: Apache-2.0
"""Three patterns at two budgets each, 768 tokens.

Run:     python -m experiments.frontier
           --config=configs/frontier/smoke.py --workdir=out/frontier_smoke
Device:  CPU, about a minute.
Expect:  a report whose lines mean little: the text is short.
"""

import ml_collections

_BLOCKS = dict(block_q=64, block_kv=64)


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.dtype = "float32"
  config.lengths = (768,)
  config.sweeps = (
    dict(
      label="unisparse",
      method="unisparse",
      budget="top_p",
      values=(0.6, 0.9),
      **_BLOCKS,
    ),
    dict(
      label="random",
      method="random_blocks",
      budget="density",
      values=(0.3,),
      measure=("next_token", "layers"),
      **_BLOCKS,
    ),
    dict(
      label="streaming",
      method="streaming",
      num_sink=64,
      num_local=128,
      measure=("layers", "attention_time"),
      **_BLOCKS,
    ),
  )
  config.matched_share = 0.99
  config.tasks = ("niah_single_1",)
  config.samples = 1
  config.code_rows = 1
  config.quality_layers = (0, 1)
  config.timed_layers = (0,)
  config.implementation = "xla"
  config.dense_implementation = "tiled"
  config.jax_nn_max_len = 8192
  config.repeats = 1
  config.prefill_repeats = 1
  return config
