# SPDX-License-Identifier: Apache-2.0
"""Every kind of posterior for a few steps.

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/smoke.py --workdir=out/smoke
Device:  CPU, under a minute.
Expect:  factors of few chains: they mean little.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  small = dict(num_chains=16, lengths=(100, 200), warm_up=50, batch_size=10)
  config.rows = (
    dict(target="diabetes", calibrate=True, **small),
    dict(target="gp:diabetes:20", squares=False, polynomial=0, **small),
    dict(target="cox:4", squares=False, polynomial=0, **small),
  )
  return config
