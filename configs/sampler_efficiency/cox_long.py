# SPDX-License-Identifier: Apache-2.0
"""Cox process on 64 x 64 cells: chains longer than their autocorrelation.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/cox_long.py --workdir=out/cox
Device:  2 CPU cores, 4.5 minutes.
Expect:  results/sampler_efficiency_cox_long_cpu.jsonl, min ESS a second: NUTS
         195 (108 a CPU second), gi_latent_gaussian 101 (53), MALA 25 (13).
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  config.rows = (
    dict(
      target="cox:64",
      samplers=("gi_latent_gaussian", "mala", "nuts"),
      shorter=("nuts",),
      warm_up=1000,
      num_steps=2000,
      repeats=1,
      max_coordinates=64,
    ),
  )
  return config
