# SPDX-License-Identifier: Apache-2.0
"""The draft head and the policy that lie beside the shipped model."""

import pathlib

import numpy as np

import unisparse_jax
from unisparse_jax import data, models, speculative
from unisparse_jax.speculative import calibration

FOLDER = pathlib.Path(unisparse_jax.__file__).parent / "pretrained/pylib_12m"
TEXT = """class Point:
  def __init__(self, x, y):
    self.x = x
    self.y = y

class Segment:
  def __init__(self, start, end):
"""


def test_drafts_what_the_model_writes():
  target = models.load_hf(FOLDER)
  drafter = speculative.Eagle(head=speculative.load_head(FOLDER, target))
  artefact = calibration.load(FOLDER / "speculation.json")
  # Refuses any other head, or one that was read in another precision.
  policy = artefact.policy(
    "rule", batch=1, drafter_hash=speculative.fingerprint(drafter)
  )
  prompt = data.Tokenizer.load(FOLDER / "tokenizer.json").encode(TEXT)[None]
  plain = models.generate(target, prompt, max_new_tokens=32)
  result = speculative.generate(
    target,
    drafter,
    prompt,
    max_new_tokens=32,
    shape=speculative.TreeShape(
      width=4, base_depth=3, max_depth=6, buckets=(16,)
    ),
    policy=policy,
  )
  np.testing.assert_array_equal(result.tokens, plain)
  # An untrained head brings 1.0.
  assert speculative.summarize(result.log)["tokens_per_step"] > 1.5
