# SPDX-License-Identifier: Apache-2.0
"""Next tokens of every pattern at 16K to 128K, on the study model.

How far each moves the distribution of the next token of held-out code, at the
budgets around those that keep the answers and at its paper's; then, for those
that answers leave in the race, the times. XAttention's are of its selection
without a sort. `random 1.0` keeps all blocks: what it moves is bfloat16's.

Run:     python -m experiments.frontier
           --config=configs/frontier/study_quality.py:out/study
           --workdir=out/study/quality
Device:  one H100, some 400 s with what is compiled; next tokens of all lengths
         come before the first clock.
Expect:  in 300 s of an H200, in two calls, all of it:
         results/frontier_quality_h200.jsonl. KL at 128K: one threshold of 2
         0.006 at density 0.27, UniSparse 0.9 0.005 at 0.48, MInference 0.041
         at 0.09; all blocks 0.00005. Densities that are not measured here are
         those of `beside` (another text of that length).
"""

from configs.frontier import study

_NEXT = ("next_token",)
_LAYERS = (*_NEXT, "layers")
_TIMES = (*_LAYERS, "attention_time")
_SIZES = tuple((("vertical_slash", *s),) for s in ((500, 700), (1000, 6096)))
_LIMITS = tuple((x, x) for x in (8.0, 4.0, 2.0, 0.5, 0.25))
_WANTED = {  # label: budgets, what is measured
  "one threshold": (_LIMITS, _TIMES),
  "unisparse": ((0.8, 0.85, 0.9, 0.95), _TIMES),
  "xattention": ((0.8, 0.9, 0.95, 0.98), (*_TIMES, "prefill")),
  "minference": (_SIZES, _TIMES),
  "sample v1": ((0.5, 0.8, 0.95), _TIMES),  # full at 0.8 from 64K on
  "flexprefill": ((0.9, 0.95, 0.995), _LAYERS),
  "sample_attention": ((0.8, 0.9, 0.95), _LAYERS),
  "streaming": ((1024, 8192), _NEXT),
  "random": ((0.25, 0.5, 0.75, 1.0), _NEXT),
  "oracle": ((0.95,), _NEXT),
}


def get_config(root: str = "out/study"):
  config = study.get_config(root)
  sweeps = {sweep["label"]: sweep for sweep in config.sweeps}
  config.sweeps = tuple(
    dict(sweeps[label], values=values, measure=measure)
    for label, (values, measure) in _WANTED.items()
  )
  config.lengths = (131_072, 65_536, 32_768, 16_384)
  config.search = False
  config.beside = "results/frontier_study_h200.jsonl"
  config.reference_measure = ("next_token", "prefill")
  config.tasks = ()
  config.code_rows = 2
  config.compile_threads = 16
  config.max_seconds = 400.0
  return config
