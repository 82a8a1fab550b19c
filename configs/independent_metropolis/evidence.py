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
    problems=(
      *(
        dict(prior="student_t", dof=d, conflict=c)
        for d in (5.0, 30.0)
        for c in (0.0, 2.0, 4.0)
      ),
      *(dict(prior="laplace", dim=1, conflict=c) for c in (0.0, 4.0)),
    ),
  )
  return config
