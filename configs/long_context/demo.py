# SPDX-License-Identifier: Apache-2.0
"""UniSparse, calibrated masks and streaming beside dense attention, 8K tokens.

Run:     make demo
         or python -m experiments.long_context
           --config=configs/long_context/demo.py --workdir=out/demo
Device:  2 CPU cores, 2 minutes; 6 GiB, most of it jax.nn attention.
Expect:  results/demo_cpu.jsonl: one prompt a task, all right but streaming's.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.dtype = "float32"
  config.lengths = (8192,)
  config.patterns = (
    dict(label="unisparse 0.95", method="unisparse", top_p=0.95),
    dict(label="calibrated", method="calibrated"),
    dict(
      label="streaming",
      method="streaming",
      measure=("answers", "next_token", "layers"),
    ),
  )
  config.tasks = ("niah_multikey_2", "vt", "qa_1")
  config.samples = 1
  config.code_rows = 1
  config.quality_layers = (1, 4, 7)
  config.timed_layers = (1, 4)
  config.mask_layers = (1, 4, 7)
  config.mask_label = "unisparse 0.95"
  config.implementation = "xla"
  config.dense_implementation = "tiled"
  config.jax_nn_max_len = 8192
  config.repeats = 2
  config.prefill_repeats = 1
  return config
