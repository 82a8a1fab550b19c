# SPDX-License-Identifier: Apache-2.0
"""Further logistic posteriors: near Gaussian, and separable classes.

On digits 0/1 the curvature reaches 39 times that at the mode (in units of
Laplace's covariance). Where it is above 2 / step_size, the drift of a proposal
overshoots and chains stick: 21 at acceptance 0.77, 51 at 0.92. Chains that come
from smaller steps have left those places. With Laplace's covariance
throughout, the score term's factor at 0.77 was 30; with that of the chains,
from windows of warm-up, 38. (The inverse mean curvature gave 17, Boehning's
bound 1.8.)

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/further.py --workdir=out/further
Device:  2 CPU cores, about a minute and a half.
Expect:  results/variance_reduction_further_cpu.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  config.rows = (
    dict(target="simulated:2000:29", acceptance=0.77, lengths=(2000,)),
    *(
      dict(
        target="digits_01",
        acceptance=acceptance,
        approach=0.92,
        windows=(1000, 2000, 4000),
        lengths=(10_000,),
      )
      for acceptance in (0.77, 0.85)
    ),
  )
  return config
