# SPDX-License-Identifier: Apache-2.0
"""10,000 chains, value and gradient in one kernel that stores no logit.

Run:     python -m experiments.sampler_throughput
           --config=configs/sampler_throughput/fused.py --workdir=out/speed
           [--config.target=simulated:2000:29]
Device:  one NVIDIA GPU, about a minute.
Expect:  results/sampler_throughput_fused_h100.jsonl, which swept other tiles: a
         step takes 1.41 times the bare products on 2,000 rows (1.95 with the
         likelihood by XLA) and 2.06 (2.47) on breast cancer.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.target = "breast_cancer"
  config.batch_size = 100
  config.acceptances = (0.775,)
  config.likelihoods = ("own", "xla")
  # Chains, rows, warps, stages, programs for the rows; how it multiplies.
  config.tiles = (
    (64, 32, 4, 2, 1, "tf32x3"),
    (64, 32, 4, 2, 2, "tf32x3"),
    (64, 32, 4, 2, 4, "tf32x3"),
    (64, 32, 4, 2, 8, "tf32x3"),
    (64, 64, 4, 2, 4, "tf32x3"),
    (16, 128, 4, 2, 4, "tf32x3"),
  )
  config.sampled = ("own", "fastest")
  config.nuts_steps = 0  # Of the same chains: default.py and simulated.py
  config.repeats = 5
  return config
