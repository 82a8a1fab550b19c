# SPDX-License-Identifier: Apache-2.0
"""Flows as proposals, where no Gaussian and no mixture of a few comes close.

Run:     python -m experiments.independent_metropolis
           --config=configs/independent_metropolis/flow.py
           --workdir=out/flow
Device:  CPU, 2 cores, about 8 minutes.
Expect:  results/independent_metropolis_flow.jsonl.
"""

import ml_collections


def _flow(label, **more):
  return dict(
    label=label,
    kind="flow",
    objective="reverse",
    gradient_steps=3_000,
    gradient_draws=128,
    learning_rate=0.01,
    **more,
  )


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  # mu given log tau, then the effects given both; twice. Random halves, which
  # know nothing of the model, do better.
  funnel = ((1,), (0, 1)) * 2
  config.posteriors = (
    dict(
      name="breast_cancer",
      fits=(
        _flow("flow_2", num_layers=2),
        _flow("flow_6", num_layers=6),
      ),
      peers=("snis",),
      num_replicates=100,
    ),
    dict(
      name="eight_schools_centred",
      fits=(
        _flow("flow_halves", num_layers=6),
        _flow("flow_hierarchy", kept=funnel),
        _flow("flow_hierarchy_both", kept=funnel)
        | dict(objective="both", num_steps=2_000),
      ),
      peers=("snis",),
      num_replicates=100,
    ),
  )
  return config
