# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unisparse_jax import models
from unisparse_jax.speculative import eagle_head, head_files

CONFIG = models.DecoderConfig(
  vocab_size=24,
  num_layers=2,
  embed_dim=8,
  mlp_dim=12,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  max_len=32,
)


def test_round_trip_and_refusal(tmp_path):
  config = eagle_head.EagleHeadConfig(
    target=CONFIG, tap_layers=(0, 1), norm_before_fusion=True
  )
  head = eagle_head.EagleHead(config, rngs=nnx.Rngs(3))
  head_files.save_head(head, tmp_path, dtype=jnp.float32, about={"steps": 5})
  found = head_files.load_head(tmp_path, CONFIG)
  assert found.config == config
  for a, b in zip(jax.tree.leaves(head), jax.tree.leaves(found), strict=True):
    np.testing.assert_array_equal(a, b)
  other = dataclasses.replace(CONFIG, num_layers=3)
  with pytest.raises(ValueError, match="head must be made for this target"):
    head_files.load_head(tmp_path, other)
  with pytest.raises(ValueError, match="folder must hold a draft head"):
    head_files.load_head(tmp_path / "none", CONFIG)


def test_starts_from_the_target():
  target = models.Decoder(CONFIG, rngs=nnx.Rngs(0))
  head = eagle_head.EagleHead.from_target(target, rngs=nnx.Rngs(1))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 8)), jnp.float32)
  num_taps = len(head.config.tap_layers)
  taps = jnp.concatenate([jnp.ones((1, 2, 8 * (num_taps - 1))), x], axis=-1)
  np.testing.assert_allclose(head.fused(taps), x, atol=1e-6)  # the high tap
  np.testing.assert_allclose(
    head.logits(x), target.logits(target.norm(x)), rtol=1e-5, atol=1e-6
  )
