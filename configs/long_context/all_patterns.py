# SPDX-License-Identifier: Apache-2.0
"""Every method at the settings of its paper, on one kernel.

MInference's sizes are per token and stay as published, so that at short
lengths it keeps nearly everything.

Run:     python -m experiments.long_context
           --config=configs/long_context/all_patterns.py --workdir=out/patterns
         Longer: --config.lengths="(32768,)"
Device:  2 CPU cores for hours, or a GPU for minutes.
Expect:  with lengths=(4096,), tasks=() on 2 CPU cores in 4 minutes KL on the
         next token 0.014 nats at density 0.43 for UniSparse, 0.002 at 0.65 for
         SampleAttention (v1 0.019 at 0.75), 0.008 at 0.57 for FlexPrefill,
         0.046 and 0.037 at 0.33 for XAttention, 0.014 at 0.42 for the oracle,
         0.70 at 0.26 for random blocks; MInference and streaming keep all:
         results/all_patterns_cpu.jsonl. Longer ones were not recorded.
"""

from configs.long_context import default

# Method, label, settings beside the dataclass's defaults.
PAPERS = (
  ("unisparse", "unisparse 0.95", dict(top_p=0.95)),
  ("sample_attention", "sample_attention 0.95", dict(top_p=0.95)),
  (
    "sample_attention_v1",
    "sample_attention_v1 0.95",
    dict(top_p=0.95, max_columns=4096),
  ),
  ("minference", "minference", dict()),
  ("flexprefill", "flexprefill 0.95", dict(top_p=0.95)),
  ("xattention", "xattention 8, 0.9", dict(stride=8, top_p=0.9)),
  ("xattention", "xattention 16, 0.9", dict(stride=16, top_p=0.9)),
  ("streaming", "streaming", dict(num_sink=1024, num_local=8192)),
  ("oracle", "oracle 0.95", dict(top_p=0.95)),
  ("random_blocks", "random 0.25", dict(density=0.25)),
)


def get_config():
  config = default.get_config()
  config.patterns = tuple(
    dict(label=label, method=method, **settings)
    for method, label, settings in PAPERS
  )
  config.mask_label = "unisparse 0.95"
  return config
