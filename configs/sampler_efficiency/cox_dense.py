# SPDX-License-Identifier: Apache-2.0
"""Cox process on 64 x 64 cells: FFT beside samplers that need the matrix.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/cox_dense.py --workdir=out/dense
Device:  one NVIDIA GPU, about 90 seconds, some of them for the eigenvectors
         of a 4,096 x 4,096 matrix on the host.
Expect:  results/sampler_efficiency_h100.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float32"
  common = dict(num_chains=16, repeats=1, max_coordinates=64)
  long = dict(warm_up=1000, num_steps=1000, **common)
  config.rows = (
    dict(
      target="cox:64", samplers=("gi_latent_gaussian", "mala", "pcn"), **long
    ),
    dict(
      target="cox_dense:64",
      samplers=("gi_latent_gaussian", "mgrad_gaussian", "elliptical_slice"),
      **long,
    ),
    # A step of NUTS costs many times as much, and its effective sizes per
    # second do not depend on the number of steps.
    dict(
      target="cox:64", samplers=("nuts",), warm_up=200, num_steps=200, **common
    ),
  )
  return config
