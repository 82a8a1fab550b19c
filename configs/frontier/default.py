# SPDX-License-Identifier: Apache-2.0
"""Every pattern at several budgets, 8,192 and 16,384 tokens.

Run:     python -m experiments.frontier
           --config=configs/frontier/default.py --workdir=out/frontier
         Longer: --config.lengths="(32768,)"
         On a CPU: --config.implementation=xla --config.dtype=float32
           --config.dense_implementation=tiled --config.compile_threads=2
           --config.max_seconds=1e6
Device:  one H100 for six minutes at most, or 2 CPU cores for hours. Answers,
         next tokens and layers come before the first clock.
Expect:  in 170 s of an H200 with what is compiled, all of it:
         results/frontier_default_h200.jsonl. UniSparse 0.98 keeps the score
         at 1.33x (8K) and 1.79x (16K) of cuDNN, XAttention with stride 16 at
         1.12x and 1.96x. `random 1.0` keeps all blocks: what it moves next
         tokens by, 0.0002 nats, is bfloat16's.
"""

import ml_collections

_SHARES = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_METHODS = (
  ("unisparse", dict()),
  ("xattention", dict(stride=8)),
  ("xattention", dict(stride=16)),
  ("flexprefill", dict()),
  ("sample_attention", dict()),
  ("sample_attention_v1", dict(max_columns=4096)),
)
_VERTICAL_SLASH = ((50, 200), (100, 800), (500, 700), (1000, 4096))


def get_config():
  config = ml_collections.ConfigDict()
  config.model = "pylib_12m"
  config.seed = 0
  config.dtype = "bfloat16"
  config.lengths = (8192, 16_384)
  config.sweeps = (
    dict(  # As slow as dense attention in XLA: no answers, no times.
      label="oracle",
      method="oracle",
      budget="top_p",
      values=_SHARES,
      measure=("next_token", "layers"),
    ),
    *(
      dict(
        label=" ".join([method, *(str(x) for x in settings.values())]),
        method=method,
        budget="top_p",
        values=_SHARES,
        **settings,
      )
      for method, settings in _METHODS
    ),
    dict(
      label="minference",
      method="minference",
      budget="heads",
      values=tuple(
        (("vertical_slash", columns, slashes),)
        for columns, slashes in _VERTICAL_SLASH
      ),
    ),
    dict(
      label="streaming",
      method="streaming",
      budget="num_local",
      values=(512, 1024, 2048, 4096),
    ),
    dict(
      label="random",
      method="random_blocks",
      budget="density",
      values=(0.1, 0.25, 0.5, 0.75, 1.0),
    ),
  )
  config.matched_share = 0.99
  config.tasks = ("niah_multikey_2", "niah_multiquery", "vt", "fwe", "qa_1")
  config.samples = 10
  config.code_rows = 2
  config.quality_layers = ()
  config.timed_layers = (1, 4, 6)
  config.scan_layers = True
  config.compile_threads = 12
  config.max_seconds = 330.0
  config.implementation = "mosaic_gpu"
  config.dense_implementation = "cudnn"
  config.jax_nn_max_len = 8192
  config.repeats = 3
  config.prefill_repeats = 3
  return config
