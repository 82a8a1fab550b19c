# SPDX-License-Identifier: Apache-2.0
"""Factors on logistic posteriors.

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/default.py --workdir=out/factors
Device:  2 CPU cores, about five minutes.
Expect:  results/variance_reduction_cpu.jsonl.
"""

import ml_collections

_LOGISTIC = ("breast_cancer", "breast_cancer_mean", "diabetes")


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
  )
  return config
