# SPDX-License-Identifier: Apache-2.0
"""One posterior and one marginal likelihood, small.

Run:     python -m experiments.independent_metropolis
           --config=configs/independent_metropolis/smoke.py
           --workdir=out/imh_smoke
Device:  CPU, under a minute.
Expect:  gains of about 90 for a shift of 0.1 standard deviations.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.posteriors = (
    dict(
      name="shift_0.1",
      fits=(dict(label="start", kind="start"),),
      peers=("snis",),
      num_draws=500,
      num_replicates=50,
    ),
  )
  config.evidence = dict(
    problems=(dict(prior="student_t", conflict=2.0),),
    mixture_steps=(None, 2.0),
    num_evaluations=10_000,
    num_replicates=8,
  )
  return config
