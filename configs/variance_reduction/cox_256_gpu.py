# SPDX-License-Identifier: Apache-2.0
"""A log-Gaussian Cox process on 256 x 256 cells, on a GPU.

The latent field lives on a torus of 512 x 512 cells: 262,144 coordinates, in
products with its covariance by FFT.

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/cox_256_gpu.py --workdir=out/cox
Device:  one NVIDIA GPU, about a minute.
Expect:  to be filled from the first recorded run.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float32"
  config.rows = (
    dict(
      target="cox:256",
      acceptance=0.82,
      num_chains=16,
      warm_up=1000,
      lengths=(1000, 4000),
      batch_size=50,
      squares=False,
      polynomial=0,
    ),
  )
  return config
