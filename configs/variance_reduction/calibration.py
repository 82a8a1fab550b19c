# SPDX-License-Identifier: Apache-2.0
"""Intervals of single chains: how often they hold the truth.

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/calibration.py --workdir=out/cal
Device:  2 CPU cores, about two minutes.
Expect:  results/variance_reduction_calibration_cpu.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 1
  config.dtype = "float64"
  config.rows = tuple(
    dict(
      target=target,
      acceptance=0.9,
      num_chains=200,
      lengths=(4000,),
      batch_size=100,
      polynomial=0,
      squares=False,
      calibrate=True,
    )
    for target in ("breast_cancer_mean", "diabetes", "breast_cancer")
  )
  return config
