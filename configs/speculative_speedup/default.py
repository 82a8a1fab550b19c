# SPDX-License-Identifier: Apache-2.0
"""Every method on the 155M target: five domains, batch 1 to 64.

Run:     python -m experiments.calibrate_speculation
           --config=configs/speculative_speedup/default.py
           --workdir=out/calibration
         python -m experiments.speculative_speedup
           --config=configs/speculative_speedup/default.py
           --workdir=out/speculative
         after the target (configs/train_decoder/target_155m.py, out/target)
         and its head (configs/train_draft_head/default.py, out/head).
Device:  one H100 or H200 a batch size: calibration a minute, a batch and a
         temperature two to five, both with what they compile.
Expect:  on H200s, mean of five domains, against plain decoding: the fixed
         tree, depth and size by bin, and the predictor, greedy, 3.59, 3.83 and
         3.83 times at batch 1 (with batch_1_prompts=8, repeats=3), 2.53, 2.55
         and 2.57 at 4, 1.75, 1.92 and 1.94 at 16, 0.97, 1.57 and 1.56 at 64; at
         temperature 1, likewise, 2.49, 2.63 and 2.63, 1.87, 1.98 and 2.03,
         1.28, 1.42 and 1.45, 0.57, 0.97 and 1.01
         (results/speculative_launches_h200.jsonl; few: another target,
         speculative_drafters_h200.jsonl).
"""

import ml_collections
from ml_collections import config_dict

# EAGLE-1's tree of 26 nodes: (index in the level above, rank of the child).
_STATIC = (
  ((0, 0), (0, 1), (0, 2), (0, 3)),
  ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)),
  ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (3, 0)),
  ((0, 0), (0, 1), (0, 2), (1, 0)),
  ((0, 0), (0, 1), (1, 0)),
)


def get_config():
  config = ml_collections.ConfigDict()
  config.target = "out/target/model"
  config.head = "out/head/head"
  config.corpus = "out/target/data/corpus"
  config.artefact = "out/calibration/policy.json"
  # A quarter of the steps accept nothing and a sixth all of ten levels: hence
  # few levels before the policy is asked, and many after. One size: that of 16
  # nodes saves 0.07 ms of 1.35, and a choice between two costs as much.
  config.shape = dict(
    width=8, base_depth=4, max_depth=16, level_block=4, buckets=(64,)
  )
  # Rows of these batches share one verification of so many nodes, the likeliest
  # of all rows.
  config.packed = ((4, 128), (16, 256), (64, 1024))
  config.chain_shape = dict(width=1, base_depth=10, buckets=(16,))
  config.combined_shape = dict(
    width=8, base_depth=4, max_depth=20, level_block=8, buckets=(64,)
  )
  config.combined_nodes = 31
  config.combined_cost = 1.7
  config.static_shape = dict(
    width=8, base_depth=5, buckets=(32,), static_levels=_STATIC
  )
  config.calibration = dict(
    prompts=32,
    new_tokens=128,
    batch_size=16,
    temperatures=(0.0, 1.0),
    max_seconds=config_dict.placeholder(float),
    alpha=12,  # Levels 16, 15, 14 where drafts are sure, else 4.
  )
  config.fixed_depth = 8
  config.fixed_nodes = 60
  config.methods = (
    "plain",
    "fixed",
    "heterospec",
    "joint",
    "thrifty",
    "fixed_same",
    "fixed_best",
    "predictive",
    "gated",
    "eagle2",
    "ngram",
    "suffix",
    "combined",
    "static",
    "oracle",
  )
  config.few = ("eagle2", "ngram", "suffix", "combined", "static", "oracle")
  config.few_at = ((1, 0.0), (16, 0.0))
  config.batches = (1, 4, 16, 64)
  config.temperatures = (0.0, 1.0)
  config.prompts = 64
  config.same_text = True
  config.repeats = 5
  config.batch_1_prompts = 4
  config.prompt_len = 1024
  config.short_prompt = 256
  config.new_tokens = 256
  config.long_prompts = (3584, 7168)
  config.long_new_tokens = 512
  config.long_methods = ("fixed", "heterospec")
  config.exact_prompts = 4
  config.exact_batches = (4,)
  config.exact_new_tokens = 64
  config.dtype = "bfloat16"
  # Side by side, programs time their candidate kernels against one another.
  config.compile_threads = 1
  config.max_seconds = config_dict.placeholder(float)
  config.seed = 0
  return config
