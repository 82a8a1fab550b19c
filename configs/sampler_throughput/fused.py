# SPDX-License-Identifier: Apache-2.0
"""10,000 chains, value and gradient in one kernel that stores no logit.

Run:     python -m experiments.sampler_throughput
           --config=configs/sampler_throughput/fused.py --workdir=out/speed
           [--config.target=simulated:2000:29]
Device:  one NVIDIA GPU, about a minute.
Expect:  to be filled from the first recorded run.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.target = "breast_cancer"
  config.batch_size = 100
  config.acceptances = (0.775,)
  config.likelihoods = ("own", "xla")
  # Chains, rows, warps, stages of the kernel; how it multiplies.
  config.tiles = (
    (64, 64, 4, 2, "tf32x3"),
    (32, 64, 4, 2, "tf32x3"),
    (16, 128, 4, 2, "tf32x3"),
    (64, 128, 8, 2, "tf32x3"),
    (128, 64, 8, 2, "tf32x3"),
    (64, 32, 4, 2, "tf32x3"),
    (64, 64, 8, 2, "ieee"),
    (32, 32, 4, 2, "ieee"),
  )
  config.sampled = ("own", "fastest")
  config.nuts_steps = 0  # Of the same chains: default.py and simulated.py
  config.repeats = 5
  return config
