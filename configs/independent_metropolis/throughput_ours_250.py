# SPDX-License-Identifier: Apache-2.0
"""A million proposals of a thousand chains, drawn in blocks of 250 steps.

Run:     python -m experiments.independent_metropolis
           --config=configs/independent_metropolis/throughput_ours_250.py
           --workdir=out/throughput_ours_250
Device:  one GPU (or a CPU), under a minute.
Expect:  see results/independent_metropolis_throughput.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.throughput = dict(
    implementation="ours",
    num_chains=1_000,
    num_steps=1_000,
    block_size=250,
    num_terms=2,
    repeats=5,
  )
  return config
