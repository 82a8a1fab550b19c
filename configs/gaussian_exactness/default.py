# SPDX-License-Identifier: Apache-2.0
"""All Gaussian-invariant samplers, up to condition 1e6 in 100 dimensions.

Run:     python -m experiments.gaussian_exactness
           --config=configs/gaussian_exactness/default.py --workdir=out/exact
Device:  2 CPU cores, about eight minutes.
Expect:  results/gaussian_exactness_cpu.jsonl: log ratios below 6.5e-12 in
         float64, 1.7e-5 in float32 in white coordinates (in x 2e-3 for samplers
         with a gradient, 9e-5 for gi_latent_gaussian).
"""

import ml_collections

_SAMPLERS = ("gi_rwm", "gi_mala", "gi_hessian_mala", "gi_latent_gaussian")


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.rows = tuple(
    dict(sampler=sampler, dim=dim, dtype=dtype, coordinates=coordinates)
    for dtype, coordinates in (
      ("float64", "x"),
      ("float32", "white"),
      ("float32", "x"),
    )
    for dim in (10, 100)
    for sampler in _SAMPLERS
    if (sampler, coordinates) != ("gi_latent_gaussian", "white")
  )
  return config
