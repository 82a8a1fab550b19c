# SPDX-License-Identifier: Apache-2.0
"""One sampler in few dimensions.

Run:     python -m experiments.gaussian_exactness
           --config=configs/gaussian_exactness/smoke.py --workdir=out/smoke
Device:  CPU, under a minute.
Expect:  ratios below 1e-4 in float32, below 1e-12 in float64.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  common = dict(dim=3, conditions=(1e4,), step_sizes=(0.7,), num_steps=100)
  config.rows = (
    dict(sampler="gi_mala", dtype="float32", coordinates="white", **common),
    dict(sampler="gi_latent_gaussian", **common),
  )
  return config
