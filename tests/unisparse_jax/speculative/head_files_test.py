# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors

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
  target = models.Decoder(CONFIG, rngs=nnx.Rngs(0))
  config = eagle_head.EagleHeadConfig(
    target=CONFIG, tap_layers=(0, 2), norm_before_fusion=True, share_output=True
  )
  head = eagle_head.EagleHead.from_target(
    target, config=config, rngs=nnx.Rngs(3)
  )
  head_files.save_head(head, tmp_path, dtype=jnp.float32, about={"steps": 5})
  stored = safetensors.load_file(tmp_path / head_files.WEIGHTS)
  assert not any(name.startswith(("embed.", "lm_head")) for name in stored)
  found = head_files.load_head(tmp_path, target)
  assert found.config == config
  for a, b in zip(jax.tree.leaves(head), jax.tree.leaves(found), strict=True):
    np.testing.assert_array_equal(a, b)
  other = models.Decoder(
    dataclasses.replace(CONFIG, num_layers=3), rngs=nnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="head must be made for this target"):
    head_files.load_head(tmp_path, other)
  with pytest.raises(ValueError, match="folder must hold a draft head"):
    head_files.load_head(tmp_path / "none", target)


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
