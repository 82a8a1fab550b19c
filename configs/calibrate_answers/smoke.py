# SPDX-License-Identifier: Apache-2.0
"""The whole path in a minute on a CPU; its numbers mean nothing.

Run:     python -m experiments.calibrate_answers
           --config=configs/calibrate_answers/smoke.py --workdir=out/smoke
Device:  any.
Expect:  two calibrations.
"""

from configs.calibrate_answers import default


def get_config():
  config = default.get_config()
  config.lengths = (512,)
  config.tasks = ("niah_single_1",)
  config.samples = 1
  config.scorers = config.scorers[1:]
  config.scorer_cost = config.scorer_cost[1:]
  config.budgets = (2.5, 12.0)
  config.tolerances = (0.3, 3.0)
  return config
