# SPDX-License-Identifier: Apache-2.0
"""The path of `top_p.py` in a minute on a CPU; its numbers mean nothing.

Run:     python -m experiments.calibrate_answers
           --config=configs/calibrate_answers/top_p_smoke.py --workdir=out/smoke
Device:  any.
Expect:  two calibrations.
"""

from configs.calibrate_answers import top_p


def get_config(method: str = "unisparse"):
  config = top_p.get_config(method)
  config.lengths = (512,)
  config.tasks = ("niah_single_1",)
  config.samples = 1
  config.budgets = (0.95, 0.2)
  # Whatever it costs.
  config.tolerances = (3.0, 1000.0)
  return config
