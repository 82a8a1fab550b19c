# SPDX-License-Identifier: Apache-2.0
"""Models that several test files share."""

import pathlib

import pytest
from flax import nnx

from unisparse_jax import models

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def goldens():
  """Folder of checkpoints written by `make_goldens.py`."""
  return GOLDENS


@pytest.fixture(scope="session")
def model():
  """A decoder with large random weights, so that attention is far from flat."""
  return models.load_hf(GOLDENS / "qwen3")


@pytest.fixture(scope="session")
def config():
  """Settings of a decoder small enough to build in every test."""
  return models.DecoderConfig(
    vocab_size=32,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_len=64,
  )


@pytest.fixture(scope="session")
def small_model(config):
  """A decoder with initial weights."""
  return models.Decoder(config, rngs=nnx.Rngs(0))
