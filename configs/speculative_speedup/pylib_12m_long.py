# SPDX-License-Identifier: Apache-2.0
"""Long prompt and long answer on the shipped model, prefilled dense or sparse.

Run:     as pylib_12m.py, whose artefact it needs:
         python -m experiments.speculative_speedup
           --config=configs/speculative_speedup/pylib_12m_long.py
           --workdir=out/pylib_long
Device:  CPU, two cores, 15 minutes on a machine that others load.
Expect:  prefilled with the calibrated masks, 2.19 tokens a call to the dense
         prefill's 2.23; both write what plain decoding writes after the same
         prefill. Seconds are no finding: loads of 8 to 16 while measured.
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
  config.interleave = False
  return config
