# SPDX-License-Identifier: Apache-2.0
"""A tiny target and drafter with weights large enough to be decisive."""

import jax
import pytest
from flax import nnx

from unisparse_jax import models

CONFIG = models.DecoderConfig(
  vocab_size=24,
  num_layers=2,
  embed_dim=16,
  mlp_dim=24,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_len=64,
  tie_embeddings=False,  # tied, random weights repeat their last token
)


def make_model(seed, config=CONFIG, factor=8.0):
  """A decoder whose matrices are `factor` times their initial size."""
  model = models.Decoder(config, rngs=nnx.Rngs(seed))
  state = nnx.state(model, nnx.Param)
  nnx.update(
    model, jax.tree.map(lambda x: x * factor if x.ndim > 1 else x, state)
  )
  return model


@pytest.fixture(scope="session")
def target():
  return make_model(0)


@pytest.fixture(scope="session")
def other_model():
  return make_model(1)
