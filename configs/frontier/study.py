# SPDX-License-Identifier: Apache-2.0
"""Every pattern at matched answers, 16K to 128K, on the study model.

Run:     python -m experiments.frontier
           --config=configs/frontier/study.py:out/study
           --workdir=out/study/frontier
         All of it, with both trainings: STUDY=out/study scripts/study.sh
         Before, while the model trains, where its folder has config.json and
         tokenizer.json: --config.compile_only=True --workdir=out/study/compile
Device:  one H100, at most max_seconds; what is wanted most comes first.
Expect:  without a calibration, whose sweep is then left out, in 620 s of an
         H200 all lengths in full: results/frontier_study_h200.jsonl. So few do
         not separate patterns; study_more_prompts.py takes more.
"""

import ml_collections

TASKS = ("answers", "layers", "attention_time", "prefill")
_OURS = dict(  # as configs/calibrate_answers/study.py
  over_queries="max",
  head_group=None,
  num_local_blocks=2,
  window_q=8,
  window_kv=8,
  block_q=128,
  block_kv=64,
)
_SHARES = (0.8, 0.9, 0.95, 0.98, 0.995, 0.999)


def _sweep(label, method, budget, values, **settings):
  values = dict(budget=budget, values=tuple(values), measure=TASKS)
  return dict(label=label, method=method, **values, **settings)


def _sweeps(root):
  file = f"{root}/calibration.json"
  factors = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1)
  limits = tuple((x, x) for x in (8.0, 4.0, 2.0, 1.0, 0.5, 0.25))
  sizes = ((500, 700), (1000, 6096))
  # One size for all heads: the search by head chose one in 46 of 48
  # (configs/calibrate/minference.py).
  vertical_slash = [(("vertical_slash", *size),) for size in sizes]
  by_limit = ("unisparse_threshold", "min_score", limits)
  shares = ("top_p", _SHARES)
  ours = dict(file=file, optional=True)
  return (  # the most wanted first
    _sweep("ours", "calibrated", "factor", factors, **ours),
    _sweep("unisparse", "unisparse", *shares),
    _sweep("xattention", "xattention", *shares, stride=8),
    _sweep("flexprefill", "flexprefill", *shares),
    _sweep("sample_attention", "sample_attention", *shares),
    _sweep("minference", "minference", "heads", vertical_slash),
    _sweep("sample v1", "sample_attention_v1", *shares, max_columns=4096),
    _sweep("one threshold", *by_limit, **_OURS),
    _sweep("streaming", "streaming", "num_local", (1024, 8192), num_sink=1024),
    _sweep("random", "random_blocks", "density", (0.25, 0.5, 0.75)),
    dict(
      label="oracle",
      method="oracle",
      budget="top_p",
      values=(0.9, 0.95, 0.98),
      measure=("layers",),
    ),
  )


def get_config(root: str = "out/study"):
  config = ml_collections.ConfigDict()
  config.model = f"{root}/train/model"
  config.seed = 0
  config.dtype = "bfloat16"
  # The longest and 64K first; a search starts where the length before ended.
  config.lengths = (65_536, 131_072, 32_768, 16_384)
  config.sweeps = _sweeps(root)
  config.matched_share = 0.99
  config.search = True
  config.compile_only = False
  config.scan_layers = True
  config.compile_threads = 8
  config.max_seconds = 620.0
  config.reference_measure = ("answers", "prefill")
  config.tasks = ("niah_multikey_2", "niah_multiquery", "vt", "qa_1")
  config.samples = 8
  config.captured_task = "qa_1"
  config.quality_layers = ()
  config.timed_layers = tuple(range(8))
  config.implementation = "mosaic_gpu"
  config.dense_implementation = "cudnn"
  config.jax_nn_max_len = 0
  config.repeats = 3
  config.prefill_repeats = 3
  return config
