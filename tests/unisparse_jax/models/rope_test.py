# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from unisparse_jax import models
from unisparse_jax.models import config as config_lib
from unisparse_jax.models import rope

NAMES = ("llama", "llama_linear", "llama3", "qwen2", "qwen3", "qwen3_yarn")


@pytest.mark.parametrize("name", NAMES)
def test_frequencies_equal_transformers(goldens, name):
  expected = safetensors_numpy.load_file(
    goldens / name / "expected.safetensors"
  )["inv_freq"]
  actual, _ = rope.frequencies(models.load_hf_config(goldens / name))
  # Theirs are computed in float32.
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_scalings_differ_from_plain(goldens):
  plain, _ = rope.frequencies(models.load_hf_config(goldens / "llama"))
  for name in ("llama_linear", "llama3", "qwen3_yarn"):
    scaled, _ = rope.frequencies(models.load_hf_config(goldens / name))
    assert np.abs(scaled / plain - 1.0).max() > 0.4
  llama3, _ = rope.frequencies(models.load_hf_config(goldens / "llama3"))
  # All three cases: kept, interpolated, divided.
  ratio = plain / llama3
  assert ratio.min() == pytest.approx(1.0) and ratio.max() == pytest.approx(8.0)
  assert ((ratio > 1.1) & (ratio < 7.9)).any()


@pytest.mark.parametrize(
  "settings, expected",
  [
    (dict(factor=4.0), 0.1 * np.log(4.0) + 1.0),
    (dict(factor=1.0), 1.0),
    (dict(factor=4.0, attention_factor=0.7), 0.7),
    (
      dict(factor=4.0, mscale=2.0, mscale_all_dim=0.5),
      (0.2 * np.log(4.0) + 1.0) / (0.05 * np.log(4.0) + 1.0),
    ),
  ],
)
def test_yarn_attention_factor(config, settings, expected):
  scaling = models.YarnScaling(original_max_len=32, **settings)
  config = dataclasses.replace(config, rope_scaling=scaling)
  assert rope.frequencies(config)[1] == pytest.approx(expected, rel=1e-12)
  cos, _ = rope.cos_sin(jnp.zeros((1, 1), jnp.int32), config)
  np.testing.assert_allclose(cos, np.full_like(cos, expected), rtol=1e-6)


def test_yarn_ramp_ends_at_the_last_channel(config):
  # Its ends are channels 4.9 and 20.9, rounded to 4 and cut to head_dim - 1.
  scaling = models.YarnScaling(
    factor=4.0, original_max_len=2**20, beta_fast=1e4
  )
  config = dataclasses.replace(
    config, head_dim=16, rope_theta=100.0, rope_scaling=scaling
  )
  actual, _ = rope.frequencies(config)
  ramp = np.asarray([0, 0, 0, 0, 0, 1, 2, 3]) / 11.0
  expected = 100.0 ** (-np.arange(8) / 8.0) * (ramp / 4.0 + 1.0 - ramp)
  np.testing.assert_allclose(actual, expected, rtol=1e-12)


def far_config(theta):
  return models.DecoderConfig(
    vocab_size=8,
    num_layers=1,
    embed_dim=64,
    mlp_dim=64,
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    max_len=config_lib.MAX_POSITION,
    rope_theta=theta,
  )


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_angles_are_accurate_far_out(theta):
  config = far_config(theta)
  positions = np.concatenate(
    [np.arange(131_000, 131_072), [0, 1, 65_537, config_lib.MAX_POSITION - 1]]
  )
  frequencies, _ = rope.frequencies(config)
  angle = positions[:, None] * frequencies  # float64
  cos, sin = rope.cos_sin(jnp.asarray(positions, jnp.int32)[None], config)
  # Measured 3.1e-7.
  tolerance = 6e-7
  assert np.abs(cos[0, :, 0] - np.cos(angle)).max() < tolerance
  assert np.abs(sin[0, :, 0] - np.sin(angle)).max() < tolerance
  # The usual float32 product fails this test by four orders of magnitude.
  usual = (positions.astype(np.float32)[:, None]) * frequencies.astype(
    np.float32
  )
  assert np.abs(np.cos(usual) - np.cos(angle)).max() > 1e3 * tolerance


def test_rotation_depends_on_the_distance_alone():
  config = far_config(1e4)
  rng = np.random.default_rng(0)
  q, k = (
    jnp.asarray(rng.standard_normal((1, 1, 1, 64)), jnp.float32)
    for _ in range(2)
  )

  def product(q_position, k_position):
    rotated = [
      rope.apply(x, *rope.cos_sin(jnp.full((1, 1), p, jnp.int32), config))
      for x, p in ((q, q_position), (k, k_position))
    ]
    return float(jnp.vdot(*rotated))

  near = product(17, 5)
  assert product(100_017, 100_005) == pytest.approx(near, abs=1e-4)
  assert abs(product(5, 17) - near) > 0.1  # the sign of the distance counts


def test_rotation_by_a_quarter_turn():
  x = jnp.asarray([[[[1.0, 2.0, 3.0, 4.0]]]])
  zero, one = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2))
  actual = rope.apply(x, zero, one)
  np.testing.assert_array_equal(actual[0, 0, 0], [-3.0, -4.0, 1.0, 2.0])
