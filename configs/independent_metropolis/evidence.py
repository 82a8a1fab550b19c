# SPDX-License-Identifier: Apache-2.0
"""Marginal likelihoods of linear regression under conflict with the prior.

Run:     python -m experiments.independent_metropolis
           --config=configs/independent_metropolis/evidence.py
           --workdir=out/evidence
Device:  CPU, 2 cores, about 5 minutes.
Expect:  results/independent_metropolis_evidence.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.evidence = dict(
    mixture_steps=(None, 2.0, 1.0, 0.5),
    num_replicates=16,
    problems=(
      dict(prior="student_t", dof=5.0, conflict=4.0),
      dict(prior="laplace", dim=1, conflict=4.0),
      dict(prior="student_t", dof=30.0, conflict=4.0),
      dict(prior="student_t", dof=5.0, conflict=2.0),
      dict(prior="student_t", dof=5.0, conflict=0.0),
      dict(prior="laplace", dim=1, conflict=0.0),
    ),
  )
  return config
