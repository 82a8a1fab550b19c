# SPDX-License-Identifier: Apache-2.0
"""Every method on the shipped model and its shipped head, on a CPU.

Run:     python -m experiments.calibrate_speculation
           --config=configs/speculative_speedup/pylib_12m.py
           --workdir=out/pylib_calibration
         python -m experiments.speculative_speedup
           --config=configs/speculative_speedup/pylib_12m.py
           --workdir=out/pylib_speedup
Device:  CPU, two cores; 5 minutes and 25 on a machine that others load.
Expect:  no row that differs from plain decoding. At temperature 0, batch 1,
         mean tokens a call: n-gram 3.46 (this model repeats itself), suffix
         3.37, fixed tree 2.08, HeteroSpec 2.06 with 4.7% fewer nodes a token.
         The head is slower than plain decoding here in every domain (0.2 to
         0.9x): on a CPU a level costs a third of a plain step of this target,
         and a step about 12 ms against 4.7.
"""

from configs.speculative_speedup import default

_STATIC = (
  ((0, 0), (0, 1), (0, 2)),
  ((0, 0), (0, 1), (1, 0)),
  ((0, 0),),
)


def get_config():
  config = default.get_config()
  config.target = "pylib_12m"
  config.head = "pylib_12m"
  config.corpus = ""
  config.artefact = "unisparse_jax/pretrained/pylib_12m/speculation.json"
  # A level and a node cost more of a step here than on an accelerator.
  config.shape = dict(width=4, base_depth=3, max_depth=6, buckets=(1, 4, 8, 16))
  config.packed = ((4, 4, 12, 24, 48),)
  config.chain_shape = dict(width=1, base_depth=7, buckets=(1, 4, 8))
  config.static_shape = dict(
    width=4, base_depth=3, buckets=(1, 8), static_levels=_STATIC
  )
  config.calibration.update(
    alpha=3, prompts=8, new_tokens=64, batch_size=10, timed_steps=24
  )
  config.fixed_depth = 4
  config.fixed_nodes = 15
  config.few = ("eagle2", "ngram", "suffix", "static", "oracle")
  config.few_at = ((1, 0.0), (4, 0.0), (1, 1.0))
  config.batches = (1, 4)
  config.prompts = 4
  config.batch_1_prompts = 2
  config.repeats = 1
  config.interleave = True
  config.prompt_len = 512
  config.short_prompt = 160
  config.new_tokens = 64
  config.long_prompts = ()  # See pylib_12m_long.py.
  # The timed programs are float32 themselves, and every row is compared.
  config.exact_prompts = 0
  config.dtype = "float32"
  config.compile_threads = 0
  return config
