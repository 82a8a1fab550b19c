# SPDX-License-Identifier: Apache-2.0
"""Posteriors far from Gaussian, with mixture proposals fitted by the sampler.

Run:     python -m experiments.independent_metropolis
           --config=configs/independent_metropolis/non_gaussian.py
           --workdir=out/non_gaussian
Device:  CPU, 2 cores, about 5 minutes.
Expect:  results/independent_metropolis_non_gaussian.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  sixteen = dict(
    label="adapted_16",
    kind="adapted",
    num_components=16,
    objective="both",
    heavy_weight=0.02,
    num_steps=6_000,
  )
  eight = dict(
    label="adapted_8", kind="adapted", num_components=8, objective="both"
  )
  common = dict(peers=("snis", "pathfinder"), num_replicates=100)
  config.posteriors = (
    dict(name="mixture_posterior", fits=(eight,), **common),
    dict(name="eight_schools_noncentred", fits=(sixteen,), **common),
    dict(name="eight_schools_centred", fits=(sixteen,), **common),
  )
  return config
