# SPDX-License-Identifier: Apache-2.0
"""Gaussian process classification of 1,000 rows: factors of its means.

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/gp_1000.py --workdir=out/gp
Device:  2 CPU cores, about three minutes.
Expect:  results/variance_reduction_gp_1000_cpu.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  config.rows = (
    dict(
      target="gp:simulated:1000:5:1000",
      acceptance=0.75,
      num_chains=32,
      lengths=(1000,),
      warm_up=500,
      squares=False,
      polynomial=0,
    ),
  )
  return config
