# SPDX-License-Identifier: Apache-2.0
"""Long prompt and long answer on the shipped model, prefilled dense or sparse.

Run:     as pylib_12m.py, whose artefact it needs:
         python -m experiments.speculative_speedup
           --config=configs/speculative_speedup/pylib_12m_long.py
           --workdir=out/pylib_long
Device:  CPU, two cores, 2 minutes.
Expect:  results/speculative_speedup_long_cpu.jsonl, one prompt of 8,000 tokens
         and 128 of answer. Prompt and answer, against dense and plain (3.15 s):
         calibrated masks and plain 1.77x, dense and n-gram 1.11x, both 2.05x;
         HeteroSpec 0.80x dense, 1.21x with the masks, 2.23 and 2.19 tokens a
         call. Each writes what plain decoding does after the same prefill.
"""

from configs.speculative_speedup import pylib_12m


def get_config():
  config = pylib_12m.get_config()
  config.domains = ("long_context",)
  config.batches = (1,)
  config.temperatures = (0.0,)
  config.methods = ("plain", "heterospec", "ngram")
  config.prompts = 1
  config.batch_1_prompts = 1
  config.long_prompts = (8000,)
  config.long_new_tokens = 128
  config.long_methods = ("heterospec", "ngram")
  config.long_prefills = ("dense", "calibrated")
  return config
