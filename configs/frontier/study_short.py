# SPDX-License-Identifier: Apache-2.0
"""Every pattern in full at 4,096 and 8,192 tokens, on the study model.

Run:     python -m experiments.frontier
           --config=configs/frontier/study_short.py:out/study
           --workdir=out/study/short
Device:  one H100, some 250 s with what is compiled; answers and next tokens
         come before the first clock.
Expect:  in 160 s of an H200 all of it: results/frontier_short_h200.jsonl.
         UniSparse keeps the score at 1.06x (4K) and 1.50x (8K) of cuDNN, one
         threshold of 2 at 1.03x and 1.48x, all others below 1.
"""

from configs.frontier import study

_SIZES = ((100, 200), (500, 700), (1000, 6096))
_LIMITS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
_SHARES = (0.8, 0.9, 0.95, 0.98)
_VALUES = {
  "one threshold": tuple((x, x) for x in _LIMITS),
  "unisparse": _SHARES,
  "xattention": _SHARES,
  "minference": tuple((("vertical_slash", *size),) for size in _SIZES),
  "sample v1": _SHARES,
  "flexprefill": (0.9, 0.95, 0.98, 0.995),
  "sample_attention": _SHARES,
  "streaming": (512, 2048),
  "random": (0.25, 0.5, 0.75, 1.0),
  "oracle": (0.9, 0.95, 0.98),
}
_SETTINGS = {"streaming": dict(num_sink=128)}
_ALL = ("answers", "next_token", "layers", "attention_time", "prefill")
_NO_TIMES = ("answers", "next_token", "layers")


def get_config(root: str = "out/study"):
  config = study.get_config(root)
  sweeps = {sweep["label"]: sweep for sweep in config.sweeps}
  config.sweeps = tuple(
    sweeps[label]
    | dict(values=values, measure=_NO_TIMES if label == "oracle" else _ALL)
    | _SETTINGS.get(label, {})
    for label, values in _VALUES.items()
  )
  config.lengths = (8192, 4096)
  config.search = False
  config.reference_measure = ("answers", "next_token", "prefill")
  config.samples = 8
  config.code_rows = 4
  config.compile_threads = 16
  config.max_seconds = 300.0
  return config
