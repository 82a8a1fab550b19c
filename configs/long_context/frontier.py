# SPDX-License-Identifier: Apache-2.0
"""UniSparse's frontier: top_p, windows (c_q = c_k) and head groups (c_h).

Run:     python -m experiments.long_context
           --config=configs/long_context/frontier.py --workdir=out/frontier
Device:  2 CPU cores, 10 minutes.
Expect:  results/long_context_frontier_cpu.jsonl; the report draws KL and recall
         against density.
"""

from configs.long_context import default

_MEASURE = ("next_token", "layers")


def get_config():
  config = default.get_config()
  config.reference_measure = ("next_token",)
  sweeps = (
    *((f"unisparse {p}", dict(top_p=p)) for p in (0.7, 0.8, 0.9, 0.95, 0.98)),
    *(
      (f"unisparse 0.9 window {w}", dict(top_p=0.9, window_q=w, window_kv=w))
      for w in (4, 8, 32, 64)
    ),
    *(
      (f"unisparse 0.9 heads {heads}", dict(top_p=0.9, head_group=heads))
      for heads in (1, 6)
    ),
  )
  config.patterns = (
    *(
      dict(label=label, method="unisparse", measure=_MEASURE, **settings)
      for label, settings in sweeps
    ),
    dict(label="calibrated", method="calibrated", measure=_MEASURE),
    dict(label="streaming", method="streaming", measure=_MEASURE),
  )
  config.tasks = ()
  config.code_rows = 1
  config.mask_label = "calibrated"
  return config
