# SPDX-License-Identifier: Apache-2.0
"""10,000 chains of logistic regression with 31 coefficients.

Run:     python -m experiments.sampler_throughput
           --config=configs/sampler_throughput/default.py --workdir=out/speed
Device:  one NVIDIA GPU, about two minutes.
Expect:  results/sampler_throughput_h100.jsonl.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.target = "breast_cancer"
  return config
