# SPDX-License-Identifier: Apache-2.0
"""All 13 tasks at 8,192 and 16,384 tokens, and UniSparse's frontier.

Run:     python -m experiments.long_context
           --config=configs/long_context/default.py --workdir=out/long_context
         For longer inputs: --config.lengths="(32768,)"
Device:  a GPU for minutes, or 2 CPU cores for hours. Times of attention on a
         CPU: configs/long_context/cpu_speed.py.
Expect:  to be filled from the first recorded run.
"""

import ml_collections

_TASKS = (
  "niah_single_1",
  "niah_single_2",
  "niah_single_3",
  "niah_multikey_1",
  "niah_multikey_2",
  "niah_multikey_3",
  "niah_multivalue",
  "niah_multiquery",
  "vt",
  "cwe",
  "fwe",
  "qa_1",
  "qa_2",
)
_SHAPE = ("next_token", "layers", "attention_time")


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.dtype = "float32"
  config.lengths = (8192, 16_384)
  config.patterns = (
    *(
      dict(label=f"unisparse {top_p}", method="unisparse", top_p=top_p)
      for top_p in (0.7, 0.8, 0.9, 0.95, 0.98)
    ),
    dict(
      label="threshold 0.8",
      method="unisparse_threshold",
      min_score=0.8,
      window_q=4,
      window_kv=4,
      head_group=None,
      num_local_blocks=2,
      block_kv=64,
    ),
    dict(label="streaming", method="streaming"),
    dict(
      label="all blocks",
      method="dense",
      measure=("layers", "attention_time", "prefill"),
    ),
    *(
      dict(
        label=f"unisparse 0.9 window {window}",
        method="unisparse",
        top_p=0.9,
        window_q=window,
        window_kv=window,
        measure=_SHAPE,
      )
      for window in (4, 8, 32, 64)
    ),
    *(
      dict(
        label=f"unisparse 0.9 heads {heads}",
        method="unisparse",
        top_p=0.9,
        head_group=heads,
        measure=_SHAPE,
      )
      for heads in (1, 6)
    ),
  )
  config.tasks = _TASKS
  config.samples = 20
  config.batch_size = 1
  config.code_rows = 4
  config.quality_layers = ()
  config.timed_layers = (1, 4, 6)
  config.mask_layers = (0, 2, 4, 6)
  config.mask_label = "unisparse 0.9"
  config.implementation = "xla"
  config.dense_implementation = "tiled"
  config.jax_nn_max_len = 16_384
  config.repeats = 5
  config.prefill_repeats = 3
  return config
