# SPDX-License-Identifier: Apache-2.0
"""A few samplers for a few steps.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/smoke.py --workdir=out/smoke
Device:  CPU, under a minute.
Expect:  effective sizes of short chains: they mean little.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  small = dict(warm_up=50, num_steps=50, repeats=1, num_chains=2)
  config.rows = (
    dict(target="diabetes", samplers=("gi_mala", "nuts"), **small),
    dict(
      target="gp:diabetes:20",
      samplers=("gi_latent_gaussian", "mgrad_gaussian"),
      **small,
    ),
    dict(target="cox:4", samplers=("elliptical_slice",), **small),
  )
  return config
