# SPDX-License-Identifier: Apache-2.0
"""A million proposals of a thousand chains in dimension 30: ours.

Run:     python -m experiments.independent_metropolis
           --config=configs/independent_metropolis/throughput_ours.py
           --workdir=out/throughput_ours
Device:  one GPU (or a CPU), under a minute.
Expect:  see results/independent_metropolis_throughput.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.throughput = dict(implementation="ours")
  return config
