# SPDX-License-Identifier: Apache-2.0
"""Every kind of measurement on a tiny untrained model, 768 tokens.

Run:     python -m experiments.long_context
           --config=configs/long_context/smoke.py --workdir=out/smoke
           --config.model=out/train_smoke/model
Device:  CPU, under a minute.
Expect:  a report whose scores mean nothing: the model has learnt nothing.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.dtype = "float32"
  config.lengths = (768,)
  config.patterns = (
    dict(
      label="unisparse 0.9",
      method="unisparse",
      top_p=0.9,
      block_q=64,
      block_kv=64,
    ),
    dict(
      label="streaming",
      method="streaming",
      num_sink=64,
      num_local=64,
      block_q=64,
      block_kv=64,
      measure=("answers", "next_token", "layers"),
    ),
  )
  config.tasks = ("niah_single_1", "niah_single_2")
  config.samples = 1
  config.code_rows = 1
  config.quality_layers = (0, 1)
  config.timed_layers = (0,)
  config.mask_layers = (0, 1)
  config.mask_label = "unisparse 0.9"
  config.implementation = "xla"
  config.dense_implementation = "tiled"
  config.jax_nn_max_len = 8192
  config.repeats = 1
  config.prefill_repeats = 1
  return config
