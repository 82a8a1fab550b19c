# SPDX-License-Identifier: Apache-2.0
"""Factors on a logistic posterior after 50,000 and 200,000 steps.

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/long.py --workdir=out/long
Device:  2 CPU cores, about four minutes.
Expect:  results/variance_reduction_long_cpu.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  config.rows = tuple(
    dict(
      target="diabetes",
      acceptance=acceptance,
      lengths=(50_000, 200_000),
      batch_size=500,
      squares=False,
      polynomial=0,
    )
    for acceptance in (0.77, 0.92)
  )
  return config
