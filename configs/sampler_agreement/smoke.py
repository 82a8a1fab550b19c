# SPDX-License-Identifier: Apache-2.0
"""A few chains for a few steps.

Run:     python -m experiments.sampler_agreement
           --config=configs/sampler_agreement/smoke.py --workdir=out/agree
Device:  CPU, under a minute.
Expect:  gaps of short chains.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.targets = ("diabetes",)
  config.nuts_chains = 4
  config.nuts_steps = 1000
  config.num_chains = 16
  config.num_steps = 200
  return config
