# SPDX-License-Identifier: Apache-2.0
"""Gaussian process classification of 270 and 1,000 rows, on a GPU.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/gp_gpu.py --workdir=out/gp
Device:  one NVIDIA GPU, about a minute.
Expect:  results/sampler_efficiency_h100.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float32"
  common = dict(num_chains=64, repeats=2, max_coordinates=64)
  ours = ("gi_latent_gaussian", "mgrad_gaussian", "pcn", "elliptical_slice")
  # A step of NUTS costs many times as much, and its effective sizes per second
  # do not depend on the number of steps.
  config.rows = tuple(
    row
    for target in ("gp:simulated:1000:5:1000", "gp:breast_cancer_mean:270")
    for row in (
      dict(target=target, samplers=ours, warm_up=500, num_steps=500, **common),
      dict(
        target=target, samplers=("nuts",), warm_up=100, num_steps=100, **common
      ),
    )
  )
  return config
