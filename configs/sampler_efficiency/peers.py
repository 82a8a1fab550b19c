# SPDX-License-Identifier: Apache-2.0
"""Crank-Nicolson Langevin and Riemannian HMC beside ours.

Run:     python -m experiments.sampler_efficiency
           --config=configs/sampler_efficiency/peers.py --workdir=out/peers
Device:  2 CPU cores, about three minutes.
Expect:  results/sampler_efficiency_peers_cpu.jsonl: min ESS a CPU second on
         breast_cancer_mean 88,000 (NUTS 22,000, RMHMC 910), diabetes 154,000
         (7,300, 1,160), GP 3,900 (marginal gradient 3,500, pCNL 560, pCN 63),
         Cox 44 (pCNL 32, MALA 9, pCN 2).
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.dtype = "float64"
  logistic = dict(
    samplers=("gi_mala", "nuts", "rmhmc"),
    # Each of its steps solves for several midpoints.
    shorter=("rmhmc",),
    repeats=3,
  )
  config.rows = (
    dict(target="breast_cancer_mean", **logistic),
    dict(target="diabetes", **logistic),
    dict(
      target="gp:breast_cancer_mean:270",
      samplers=("gi_latent_gaussian", "mgrad_gaussian", "pcn", "pcnl"),
      repeats=3,
    ),
    dict(
      target="cox:64",
      samplers=("gi_latent_gaussian", "pcn", "pcnl", "mala"),
      warm_up=500,
      num_steps=2000,
      repeats=2,
      max_coordinates=128,
    ),
  )
  return config
