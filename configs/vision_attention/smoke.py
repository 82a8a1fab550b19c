# SPDX-License-Identifier: Apache-2.0
"""The whole path in a minute or two on a CPU; its numbers mean nothing.

Run:     python -m experiments.vision_attention
           --config=configs/vision_attention/smoke.py --workdir=out/smoke
Device:  any.
Expect:  a report; answers are no better than chance.
"""

from configs.vision_attention import default


def get_config():
  config = default.get_config()
  config.train.phases = (
    dict(num_frames=4, steps=2, batch=2, num_questions=48),
  )
  config.model = dict(embed_dim=32, mlp_dim=32, num_heads=2)
  config.num_frames = 8
  config.num_questions = 48
  config.num_videos = 1
  config.num_quality_videos = 1
  config.sweeps = (
    dict(
      label="unisparse", method="unisparse", budget="top_p", values=(0.5, 0.8)
    ),
    dict(label="streaming", method="streaming", sites=("self",)),
    dict(label="minference", method="minference"),
  )
  config.mask_label = "unisparse 0.5"
  config.repeats = 1
  return config
