# SPDX-License-Identifier: Apache-2.0
"""The search of `study.py` at 512 and 768 tokens, on a CPU.

Run:     python -m experiments.frontier
           --config=configs/frontier/study_smoke.py:out/study
           --workdir=out/study/frontier
Device:  CPU, about two minutes.
Expect:  every kind of measurement; its numbers mean nothing.
"""

from configs.frontier import study

_BLOCKS = dict(block_q=64, block_kv=64)
_SMALL = {
  "calibrated": dict(values=(1.0, 0.25)),
  "unisparse": dict(values=(0.8, 0.9, 0.99), **_BLOCKS),
  "unisparse_threshold": dict(values=((8.0, 8.0), (0.5, 0.5))),
  "minference": dict(values=((("vertical_slash", 50, 100),),)),
  "sample_attention_v1": dict(values=(0.9,), max_columns=128, **_BLOCKS),
  "oracle": dict(values=(0.9,), **_BLOCKS),
}


def get_config(root: str = "out/study"):
  config = study.get_config(root)
  config.lengths = (768, 512)
  config.dtype = "float32"
  config.sweeps = tuple(
    {**sweep, **_SMALL[sweep["method"]]}
    for sweep in map(dict, config.sweeps)
    if sweep["method"] in _SMALL
  )
  config.tasks = ("niah_single_1", "vt")
  config.captured_task = "qa_1"
  config.samples = 2
  config.quality_layers = (0, 1)
  config.timed_layers = (0, 1)
  config.implementation = "xla"
  config.dense_implementation = "tiled"
  config.repeats = 1
  config.prefill_repeats = 1
  config.compile_threads = 2
  config.max_seconds = 900.0
  return config
