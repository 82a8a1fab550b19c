# SPDX-License-Identifier: Apache-2.0
"""Times of attention and of the first token on a CPU, all layers.

Run:     python -m experiments.long_context
           --config=configs/long_context/cpu_speed.py --workdir=out/cpu_speed
Device:  2 idle CPU cores, 10 minutes; 20 GiB for jax.nn at 16,384 tokens.
Expect:  to be filled from the first recorded run.
"""

import ml_collections

_SPEED = ("layers", "attention_time", "prefill")


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.dtype = "float32"
  config.lengths = (4096, 8192, 16_384)
  config.patterns = (
    *(
      dict(
        label=f"unisparse {top_p}",
        method="unisparse",
        top_p=top_p,
        measure=_SPEED,
      )
      for top_p in (0.7, 0.8, 0.9, 0.95)
    ),
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
