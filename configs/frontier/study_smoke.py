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
  "minference": dict(values=((("vertical_slash", 50, 100),),)),
  "streaming": dict(values=(64, 256), num_sink=64, **_BLOCKS),
  "flexprefill": dict(min_budget=64, **_BLOCKS),
  "sample_attention": dict(sample_rows=16, **_BLOCKS),
  "sample_attention_v1": dict(max_columns=128, **_BLOCKS),
  "unisparse_threshold": dict(block_q=64),
  "calibrated": dict(),
}


def get_config(root: str = "out/study"):
  config = study.get_config(root)
  config.lengths = (512, 768)
  config.dtype = "float32"
  config.sweeps = tuple(
    {**sweep, **_SMALL.get(sweep["method"], _BLOCKS)}
    for sweep in map(dict, config.sweeps)
  )
  config.tasks = ("niah_single_1", "qa_1")
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
