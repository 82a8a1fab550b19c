# SPDX-License-Identifier: Apache-2.0
"""Gaussian process classification of 270 rows beside its nearest peers.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/gp_270_gpu.py --workdir=out/gp
Device:  one NVIDIA GPU, about half a minute.
Expect:  to be filled from the first recorded run.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float32"
  common = dict(
    target="gp:breast_cancer_mean:270",
    num_chains=64,
    repeats=3,
    max_coordinates=64,
  )
  config.rows = (
    dict(
      samplers=("gi_latent_gaussian", "mgrad_gaussian"),
      warm_up=500,
      num_steps=500,
      **common,
    ),
    dict(samplers=("nuts",), warm_up=100, num_steps=100, **common),
    dict(
      samplers=("pcn", "elliptical_slice"),
      warm_up=500,
      num_steps=500,
      **common,
    ),
  )
  return config
