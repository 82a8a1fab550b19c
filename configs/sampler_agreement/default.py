# SPDX-License-Identifier: Apache-2.0
"""Controlled means beside 8 chains of 20,000 steps of NUTS.

Run:     python -m experiments.sampler_agreement
           --config=configs/sampler_agreement/default.py --workdir=out/agree
Device:  2 CPU cores, about five minutes.
Expect:  results/sampler_agreement_cpu.jsonl: gaps below 4 combined errors.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.targets = ("diabetes", "breast_cancer_mean", "breast_cancer")
  return config
