# SPDX-License-Identifier: Apache-2.0
"""Times of attention, all layers, and of the first token on a CPU.

Run:     python -m experiments.long_context
           --config=configs/long_context/cpu_speed.py --workdir=out/cpu_speed
Device:  2 idle CPU cores, 10 minutes; 20 GiB for jax.nn at 16,384 tokens.
Expect:  results/cpu_speed.jsonl and the table in README.md.
"""

import ml_collections

_SPEED = ("layers", "attention_time", "prefill")


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.dtype = "float32"
  config.lengths = (8192, 16_384)
  config.reference_measure = ("prefill",)
  config.patterns = (
    dict(
      label="unisparse 0.95", method="unisparse", top_p=0.95, measure=_SPEED
    ),
    dict(label="calibrated", method="calibrated", measure=_SPEED),
    dict(label="all blocks", method="dense", measure=("attention_time",)),
  )
  config.tasks = ()
  config.samples = 1
  config.code_rows = 1
  config.quality_layers = ()
  config.timed_layers = tuple(range(8))
  config.mask_layers = ()
  config.mask_label = ""
  config.implementation = "xla"
  config.dense_implementation = "tiled"
  config.jax_nn_max_len = 16_384
  config.repeats = 3
  config.prefill_repeats = 2
  return config
