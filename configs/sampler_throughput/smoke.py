# SPDX-License-Identifier: Apache-2.0
"""A few chains for a few steps.

Run:     python -m experiments.sampler_throughput
           --config=configs/sampler_throughput/smoke.py --workdir=out/speed
Device:  CPU, under a minute.
Expect:  timings that mean nothing.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.target = "diabetes"
  config.acceptances = (0.8,)
  config.num_chains = 16
  config.num_steps = 100
  config.warm_up = 20
  config.nuts_steps = 10
  config.likelihoods = ("own", "xla")
  config.tiles = ((64, 64, 4, 2, "tf32x3"),)
  config.sampled = ("fastest",)
  config.repeats = 1
  return config
