# SPDX-License-Identifier: Apache-2.0
"""Cox process on 64 x 64 cells: FFT beside samplers that need the matrix.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/cox_dense.py --workdir=out/dense
Device:  one NVIDIA GPU, about two minutes, one of them for the eigenvectors of
         a 4,096 x 4,096 matrix on the host.
Expect:  to be filled from the first recorded run.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float32"
  common = dict(num_chains=16, warm_up=1000, num_steps=1000, repeats=2)
  config.rows = (
    dict(target="cox:64", samplers=("gi_latent_gaussian", "nuts"), **common),
    dict(
      target="cox_dense:64",
      samplers=("gi_latent_gaussian", "mgrad_gaussian", "elliptical_slice"),
      **common,
    ),
  )
  return config
