# SPDX-License-Identifier: Apache-2.0
"""Factors on logistic, Gaussian process and Cox posteriors.

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/default.py --workdir=out/factors
Device:  2 CPU cores, about 15 minutes.
Expect:  results/variance_reduction_cpu.jsonl.
"""

import ml_collections

_LOGISTIC = ("breast_cancer", "breast_cancer_mean", "diabetes")
_LATENT = ("gp:breast_cancer_mean:270", "gp:diabetes:442")


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  config.rows = (
    *(
      dict(target=target, acceptance=acceptance)
      for target in _LOGISTIC
      for acceptance in (0.77, 0.92)
    ),
    # Separable classes: Laplace's covariance is far off, and chains stick.
    dict(target="digits_01", acceptance=0.77, lengths=(10_000,)),
    *(
      dict(
        target="digits_01",
        acceptance=acceptance,
        windows=(500, 1000, 2000),
        lengths=(10_000,),
      )
      for acceptance in (0.77, 0.92)
    ),
    *(
      dict(
        target=target,
        acceptance=acceptance,
        num_chains=64,
        lengths=(1000, 4000),
        squares=False,
        polynomial=0,
      )
      for target in _LATENT
      for acceptance in (0.75, 0.92)
    ),
    dict(
      target="cox:64",
      acceptance=0.82,
      num_chains=16,
      lengths=(1000, 2000),
      squares=False,
      polynomial=0,
    ),
  )
  return config
