# SPDX-License-Identifier: Apache-2.0
"""The same on a CPU, by the XLA back end.

Run:     python -m experiments.attention_accuracy
           --config=configs/attention_accuracy/smoke.py --workdir=out/accuracy
Device:  CPU, a minute, most of which reads the corpus.
Expect:  errors of 1e-6.
"""

from configs.attention_accuracy import default


def get_config():
  config = default.get_config()
  config.length = 1024
  config.layers = (0,)
  config.dtype = "float32"
  config.implementation = "xla"
  config.num_rows = 32
  return config
