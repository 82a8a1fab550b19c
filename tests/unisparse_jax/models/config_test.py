# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math

import pytest

from unisparse_jax import models


@pytest.mark.parametrize(
  "name, value",
  [
    ("vocab_size", 0),
    ("num_layers", -1),
    ("embed_dim", 16.0),
    ("mlp_dim", True),
    ("num_kv_heads", 3),
    ("head_dim", 7),
    ("max_len", 2**20 + 1),
    ("rope_theta", math.nan),
    ("rope_theta", 1.0),
    ("norm_eps", -1e-6),
    ("norm_eps", math.inf),
    ("rope_scaling", {"rope_type": "linear"}),
    ("qk_norm", 1),
    ("tie_embeddings", None),
  ],
)
def test_bad_setting_is_named(config, name, value):
  with pytest.raises(ValueError, match=f"^{name} must .*{name}="):
    dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
  "name, make",
  [
    ("factor", lambda: models.LinearScaling(factor=0.5)),
    ("factor", lambda: models.LinearScaling(factor=math.nan)),
    (
      "high_freq_factor",
      lambda: models.Llama3Scaling(
        factor=8.0,
        low_freq_factor=4.0,
        high_freq_factor=4.0,
        original_max_len=64,
      ),
    ),
    (
      "original_max_len",
      lambda: models.YarnScaling(factor=4.0, original_max_len=0),
    ),
    (
      "beta_fast",
      lambda: models.YarnScaling(
        factor=4.0, original_max_len=32, beta_fast=0.5
      ),
    ),
    (
      "mscale",
      lambda: models.YarnScaling(
        factor=4.0, original_max_len=32, mscale=math.inf
      ),
    ),
  ],
)
def test_bad_scaling_is_named(name, make):
  with pytest.raises(ValueError, match=f"^{name} must "):
    make()


def test_equal_settings_hash_alike(config):
  scaling = models.LinearScaling(factor=2.0)
  first = dataclasses.replace(config, rope_scaling=scaling)
  second = dataclasses.replace(config, rope_scaling=scaling)
  assert hash(first) == hash(second) and first == second != config
