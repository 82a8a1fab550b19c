# SPDX-License-Identifier: Apache-2.0
"""Every method on the shipped model and its shipped head, on a CPU.

Run:     python -m experiments.calibrate_speculation
           --config=configs/speculative_speedup/pylib_12m.py
           --workdir=out/pylib_calibration
         python -m experiments.speculative_speedup
           --config=configs/speculative_speedup/pylib_12m.py
           --workdir=out/pylib_speedup
Device:  CPU, two cores: 1.5 minutes and 6.5.
Expect:  results/calibrate_speculation_cpu.jsonl, speculative_speedup_cpu.jsonl:
         no row that differs from plain decoding. At temperature 0, batch 1,
         mean tokens a call: n-gram 3.46 (this model repeats itself), suffix
         3.37, fixed tree 2.08, HeteroSpec 2.08 with 4.6% fewer nodes a token
         (as the fixed tree of that mean size). Against plain decoding n-gram
         0.8 to 2.5x, the head 0.4 to 0.6x in every domain: a level costs 0.45
         ms and a node 0.2 ms where a plain step takes 1.6. At batch 4, where
         the rows share 48 nodes by score (the fixed tree asks for 64), a step
         that drafts costs 4.4 ms beside its parts, plain 2.6: nothing pays.
         Policies that decline to draft keep 0.88 to 0.99x.
         speculative_speedup_combined_cpu.jsonl (batch 1, temperature 0, a busy
         machine): lookups and head combined 3.57 tokens a call, the most, but
         1.31x where n-gram has 1.84x and suffix 1.77x: the head does not pay,
         and to keep its cache makes a copied step take 9.0 ms, not 5.9. No row
         differs there either.
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
  config.combined_shape = dict(
    width=4, base_depth=3, max_depth=7, buckets=(1, 4, 8, 16)
  )
  config.combined_nodes = 7
  config.combined_cost = 2.1
  config.static_shape = dict(
    width=4, base_depth=3, buckets=(1, 8), static_levels=_STATIC
  )
  config.calibration.update(
    alpha=3,
    prompts=8,
    new_tokens=64,
    batch_size=10,
    timed_steps=24,
    timed_turns=3,
  )
  config.fixed_depth = 4
  config.fixed_nodes = 15
  config.few = ("eagle2", "ngram", "suffix", "combined", "static", "oracle")
  config.few_at = ((1, 0.0), (4, 0.0), (1, 1.0))
  config.batches = (1, 4)
  config.prompts = 4
  config.batch_1_prompts = 2
  config.repeats = 3
  config.prompt_len = 512
  config.short_prompt = 160
  config.new_tokens = 64
  config.long_prompts = ()  # See pylib_12m_long.py.
  # The timed programs are float32 themselves, and every row is compared.
  config.exact_prompts = 0
  config.dtype = "float32"
  config.compile_threads = 0
  return config
