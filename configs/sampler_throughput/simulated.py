# SPDX-License-Identifier: Apache-2.0
"""10,000 chains of a near-Gaussian logistic posterior, 30 coefficients.

Run:     python -m experiments.sampler_throughput
           --config=configs/sampler_throughput/simulated.py --workdir=out/speed
Device:  one NVIDIA GPU, about a minute and a half.
Expect:  results/sampler_throughput_h100.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.target = "simulated:2000:29"  # and the intercept
  return config
