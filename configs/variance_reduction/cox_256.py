# SPDX-License-Identifier: Apache-2.0
"""A log-Gaussian Cox process on 256 x 256 cells, on a CPU.

The latent field lives on a torus of 512 x 512 cells: 262,144 coordinates, in
products with its covariance by FFT.

Run:     python -m experiments.variance_reduction
           --config=configs/variance_reduction/cox_256.py --workdir=out/cox
Device:  2 CPU cores, about a minute; 2 GiB.
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
      num_chains=2,
      warm_up=100,
      lengths=(100,),
      batch_size=10,
      squares=False,
      polynomial=0,
    ),
  )
  return config
