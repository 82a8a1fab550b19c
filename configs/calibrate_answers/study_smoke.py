# SPDX-License-Identifier: Apache-2.0
"""The path of `study.py` on a tiny model, on a CPU.

Run:     python -m experiments.calibrate_answers
           --config=configs/calibrate_answers/study_smoke.py:out/study
           --workdir=out/study/calibration
Device:  CPU, a minute.
Expect:  a calibration that means nothing.
"""

from configs.calibrate_answers import study


def get_config(root: str = "out/study"):
  config = study.get_config(root)
  config.dtype = "float32"
  config.lengths = (768,)
  config.tasks = ("niah_single_1",)
  config.samples = 2
  config.batch_size = 2
  config.budgets = (2.5, 12.0)
  # Whatever it costs.
  config.tolerances = (0.2, 1000.0)
  config.implementation = "xla"
  config.max_seconds = 20.0
  return config
