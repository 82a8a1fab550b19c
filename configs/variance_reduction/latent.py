# SPDX-License-Identifier: Apache-2.0
"""Factors on Gaussian process and Cox posteriors.

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/latent.py --workdir=out/latent
Device:  2 CPU cores, about three minutes.
Expect:  results/variance_reduction_latent_cpu.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  common = dict(squares=False, polynomial=0)
  config.rows = (
    dict(
      target="cox:64",
      acceptance=0.82,
      num_chains=16,
      lengths=(1000, 2000),
      **common,
    ),
    *(
      dict(
        target=target,
        acceptance=acceptance,
        num_chains=64,
        lengths=(1000,),
        **common,
      )
      for target in ("gp:diabetes:442", "gp:breast_cancer_mean:270")
      for acceptance in (0.75, 0.92)
    ),
  )
  return config
