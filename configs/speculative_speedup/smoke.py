# SPDX-License-Identifier: Apache-2.0
"""Calibration and every method on a tiny target, a few tokens each.

Run:     as default.py, with --config.target, --config.head, --config.corpus
         and --config.artefact of the smoke runs.
Device:  CPU, three minutes, most of them compilation.
Expect:  speed-ups that mean nothing, and no row that differs.
"""

from configs.speculative_speedup import default


def get_config():
  config = default.get_config()
  config.shape = dict(width=3, base_depth=2, max_depth=4, buckets=(1, 8, 16))
  config.chain_shape = dict(width=1, base_depth=4, buckets=(1, 8))
  config.combined_shape = dict(
    width=3, base_depth=2, max_depth=6, buckets=(1, 8, 16)
  )
  config.combined_nodes = 7
  config.static_shape = dict(
    width=3,
    base_depth=2,
    buckets=(1, 8),
    static_levels=(((0, 0), (0, 1)), ((0, 0), (0, 1), (1, 0))),
  )
  config.packed = ((2, 2, 12, 32),)
  config.calibration.update(
    alpha=0,
    prompts=2,
    new_tokens=24,
    batch_size=4,
    timed_steps=4,
    timed_turns=1,
  )
  config.fixed_depth = 3
  config.fixed_nodes = 15
  config.domains = ("code", "word_problems")
  config.batches = (2,)
  config.few_at = ((2, 0.0),)
  config.prompts = 2
  config.repeats = 2
  config.batch_1_prompts = 1
  config.prompt_len = 64
  config.short_prompt = 32
  config.new_tokens = 24
  config.long_prompts = (300,)
  config.long_new_tokens = 16
  config.long_methods = ("heterospec",)
  # The same programs as those that are timed.
  config.exact_prompts = 2
  config.exact_batches = (2,)
  config.exact_new_tokens = 24
  config.dtype = "float32"
  return config
