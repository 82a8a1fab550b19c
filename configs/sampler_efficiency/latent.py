# SPDX-License-Identifier: Apache-2.0
"""Gaussian process classification and a Cox process, all samplers in turn.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/latent.py --workdir=out/latent
Device:  2 CPU cores, about 25 minutes; 4 GiB.
Expect:  results/sampler_efficiency_latent_cpu.jsonl, whose step sizes on the
         Cox process aimed at acceptance 0.82.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  gp = (
    "gi_latent_gaussian",
    "mgrad_gaussian",
    "elliptical_slice",
    "pcn",
    "mala",
    "nuts",
  )
  # The last two need the matrix; the others multiply by FFT.
  cox = (
    "gi_latent_gaussian",
    "elliptical_slice",
    "pcn",
    "mala",
    "nuts",
    "gi_latent_gaussian@cox_dense:64",
    "mgrad_gaussian@cox_dense:64",
  )
  config.rows = (
    dict(target="gp:breast_cancer_mean:270", samplers=gp, repeats=5),
    dict(
      target="cox:64",
      samplers=cox,
      warm_up=300,
      num_steps=400,
      repeats=2,
      max_coordinates=128,
    ),
  )
  return config
