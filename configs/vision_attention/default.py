# SPDX-License-Identifier: Apache-2.0
"""Every pattern on bidirectional and cross attention, 4,608 tokens of video.

Run:     python -m experiments.vision_attention
           --config=configs/vision_attention/default.py --workdir=out/vision
Device:  2 CPU cores, to be measured.
Expect:  to be filled from the first recorded run.
"""

import ml_collections

_SHARES = (0.8, 0.9, 0.95, 0.99)


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.train = dict(
    phases=(
      dict(num_frames=4, steps=400, batch=16, num_questions=96),
      dict(num_frames=8, steps=350, batch=8, num_questions=96),
      dict(num_frames=32, steps=100, batch=2, num_questions=192),
      dict(num_frames=96, steps=50, batch=1, num_questions=384),
    ),
    learning_rate=2e-3,
  )
  config.num_frames = 96
  config.num_questions = 384
  config.num_videos = 4
  config.num_quality_videos = 1
  config.sweeps = (
    *(
      dict(label=label, method=method, budget="top_p", values=_SHARES, **more)
      for label, method, more in (
        ("oracle", "oracle", {}),
        ("unisparse 16", "unisparse", dict(head_group=1)),
        ("unisparse 4", "unisparse", dict(window_q=4, window_kv=4)),
        ("xattention 8", "xattention", dict(stride=8)),
        ("sample_attention", "sample_attention", {}),
        ("sample_attention_v1", "sample_attention_v1", {}),
      )
    ),
    dict(
      label="unisparse_threshold",
      method="unisparse_threshold",
      budget="min_score",
      values=(8.0, 3.0, 1.0, 0.3),
      over_queries="max",
      window_q=4,
      window_kv=4,
    ),
    dict(
      label="random",
      method="random_blocks",
      budget="density",
      values=(0.25, 0.5, 0.75),
    ),
    dict(
      label="streaming",
      method="streaming",
      budget="num_local",
      values=(256, 1024),
      sites=("self",),
    ),
    dict(label="flexprefill", method="flexprefill"),
    dict(label="minference", method="minference"),
  )
  config.measures = ("quality", "time")
  config.mask_label = "unisparse 16 0.9"
  config.implementation = "xla"
  config.dense_implementation = "tiled"
  config.repeats = 5
  return config
