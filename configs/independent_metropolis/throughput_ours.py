# SPDX-License-Identifier: Apache-2.0
"""A million proposals of a thousand chains in dimension 30: ours.

Run:     python -m experiments.independent_metropolis
           --config=configs/independent_metropolis/throughput_ours.py
           --workdir=out/throughput_ours
         Larger blocks: --config.throughput.block_size=250
Device:  one GPU (or a CPU), under a minute.
Expect:  results/independent_metropolis_throughput.jsonl (CPU) and
         results/independent_metropolis_throughput_h100.jsonl (both sizes).
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.throughput = dict(
    implementation="ours",
    num_chains=1_000,
    num_steps=1_000,
    block_size=100,
    num_terms=2,
    repeats=5,
  )
  return config
