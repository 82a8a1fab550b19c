# SPDX-License-Identifier: Apache-2.0
"""Every sampler for a few steps.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/smoke.py --workdir=out/smoke
Device:  CPU, under two minutes.
Expect:  effective sizes of short chains: they mean little.
"""

import ml_collections

from configs.sampler_efficiency import default


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  small = dict(warm_up=50, num_steps=50, repeats=1, num_chains=2)
  full = default.get_config().rows
  config.rows = (
    dict(target="diabetes", samplers=full[0]["samplers"], **small),
    dict(target="gp:diabetes:20", samplers=full[2]["samplers"], **small),
    dict(target="cox:4", samplers=full[4]["samplers"], **small),
    dict(target="cox_dense:4", samplers=("mgrad_gaussian",), **small),
  )
  return config
