# SPDX-License-Identifier: Apache-2.0
"""As evidence.py, with finer mixtures for the narrow scales of a t with 30 dof.

Run:     python -m experiments.independent_metropolis
           --config=configs/independent_metropolis/evidence_fine.py
           --workdir=out/evidence_fine
Device:  CPU, 2 cores, about 5 minutes.
Expect:  results/independent_metropolis_evidence.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.evidence = dict(
    mixture_steps=(0.25,),
    num_replicates=16,
    problems=(dict(prior="student_t", dof=30.0, conflict=4.0),),
  )
  return config
