# SPDX-License-Identifier: Apache-2.0
"""Posterior means by independent Metropolis and its peers.

Run:     python -m experiments.independent_metropolis
           --config=configs/independent_metropolis/default.py
           --workdir=out/independent_metropolis
Device:  CPU, 2 cores, about 10 minutes.
Expect:  results/independent_metropolis_posteriors.jsonl.
"""

import ml_collections

_START = dict(label="start", kind="start")


def _adapted(components, objective="forward", **more):
  return dict(
    label=f"adapted_{components}",
    kind="adapted",
    num_components=components,
    objective=objective,
    **more,
  )


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  one = _adapted(1)
  config.posteriors = (
    *(
      dict(name=f"shift_{s}", fits=(_START,), peers=("snis",))
      for s in (0.02, 0.1, 0.3, 0.6, 1.0)
    ),
    dict(
      name="breast_cancer_mean",
      fits=(_START, one),
      peers=("snis", "pathfinder", "nuts"),
    ),
    dict(name="breast_cancer", fits=(_START, one)),
    dict(
      name="gp_regression",
      fits=(_START, _adapted(4, num_chains=64, num_steps=2_000)),
      peers=("snis", "pathfinder"),
      num_draws=1_000,
    ),
  )
  return config
