# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import device, dispatch
from unisparse_jax.models import attention_layer, layers, rope


def test_rms_norm_literal():
  norm = layers.RMSNorm(2, eps=0.5, param_dtype=jnp.float32)
  norm.scale[...] = jnp.asarray([1.0, -2.0])
  actual = norm(jnp.asarray([[3.0, 4.0], [0.0, 0.0]]))
  root = np.sqrt(12.5 + 0.5)
  np.testing.assert_allclose(
    actual, [[3.0 / root, -8.0 / root], [0.0, 0.0]], rtol=1e-6
  )


def test_rms_norm_of_bfloat16_is_computed_in_float32():
  x = np.random.default_rng(0).standard_normal((64, 48))
  x = jnp.asarray(x, jnp.bfloat16)
  exact = np.asarray(x, np.float64)
  exact = exact / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True))
  exact = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16)
  actual = layers.RMSNorm(48, eps=0.0, param_dtype=jnp.bfloat16)(x)
  assert actual.dtype == jnp.bfloat16
  assert np.mean(np.asarray(actual != exact)) < 1e-3
  # Computed in bfloat16, a good part of the values would be off.
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  narrow = x * jax.lax.rsqrt(mean_square)
  assert np.mean(np.asarray(narrow != exact)) > 0.1


def make_embed(vocab_size, embed_dim, dtype):
  return layers.Embed(
    vocab_size,
    embed_dim,
    rngs=nnx.Rngs(0),
    dtype=dtype,
    param_dtype=jnp.float32,
  )


def test_embedding_gradient_adds_up_in_float32():
  # 1,000 ones: in bfloat16 a sum of ones stops at 256.
  embed = make_embed(3, 2, jnp.bfloat16)
  tokens = jnp.full((1, 1000), 1, jnp.int32)
  graphdef, state = nnx.split(embed)

  def total(state):
    return nnx.merge(graphdef, state)(tokens).astype(jnp.float32).sum()

  gradient = jax.grad(total)(state)["embedding"][...]
  np.testing.assert_array_equal(gradient, [[0, 0], [1000, 1000], [0, 0]])


def test_scores_are_float32_with_the_gradient_of_a_product():
  rng = np.random.default_rng(0)
  embed = make_embed(7, 5, jnp.float32)
  x = jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.float32)
  weights = jnp.asarray(rng.standard_normal((2, 3, 7)), jnp.float32)
  graphdef, state = nnx.split(embed)

  def loss(state, x):
    return jnp.vdot(weights, nnx.merge(graphdef, state).attend(x))

  grad_state, grad_x = jax.grad(loss, argnums=(0, 1))(state, x)
  table = np.asarray(embed.embedding[...])
  np.testing.assert_allclose(grad_x, weights @ table, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    grad_state["embedding"][...],
    np.einsum("abv,abd->vd", weights, x),
    rtol=1e-4,
    atol=1e-5,
  )


def test_bfloat16_scores_are_not_rounded_to_bfloat16():
  embed = make_embed(4, 64, jnp.bfloat16)
  x = jnp.asarray(
    np.random.default_rng(0).standard_normal((1, 64)), jnp.bfloat16
  )
  actual = embed.attend(x)
  table = embed.embedding[...].astype(jnp.bfloat16)
  exact = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-7)


def test_gated_mlp_literal():
  mlp = layers.GatedMLP(
    1, 2, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32
  )
  mlp.gate_proj.kernel[...] = jnp.asarray([[1.0, 2.0]])
  mlp.up_proj.kernel[...] = jnp.asarray([[3.0, 5.0]])
  mlp.down_proj.kernel[...] = jnp.asarray([[7.0], [11.0]])
  # silu(x) = x / (1 + exp(-x))
  first, second = 1.0 / (1.0 + np.exp(-1.0)), 2.0 / (1.0 + np.exp(-2.0))
  expected = 7.0 * first * 3.0 + 11.0 * second * 5.0
  actual = mlp(jnp.ones((1, 1, 1)))
  np.testing.assert_allclose(actual, [[[expected]]], rtol=1e-6)


def attention(config, dtype):
  return attention_layer.Attention(
    config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=jnp.float32
  )


@pytest.mark.parametrize(
  ("qk_norm", "dtype"),
  [(True, jnp.float32), (False, jnp.float32), (True, jnp.bfloat16)],
)
def test_merged_projection_is_the_projection(config, qk_norm, dtype):
  config = dataclasses.replace(
    config, qk_norm=qk_norm, attention_bias=not qk_norm
  )
  layer = attention(config, dtype)
  for index, (_, param) in enumerate(nnx.iter_graph(layer)):
    if isinstance(param, nnx.Param):  # biases and scales, too, unlike any other
      noise = jax.random.normal(jax.random.key(index), param.shape)
      param[...] = param[...] + 0.3 * noise
  x = jax.random.normal(jax.random.key(1), (2, 5, config.embed_dim), dtype)
  positions = jnp.asarray([[0, 1, 2, 3, 4], [7, 7, 8, 9, 60]])
  turn = rope.cos_sin(positions, config)
  expected = layer.project(x, *turn)
  with dispatch.preferring(head_rotation="reference"):
    merged = layer.project(x, *turn)
  error = 1e-5 if dtype == jnp.float32 else 2e-2
  for found, wanted in zip(merged, expected, strict=True):
    assert found.dtype == wanted.dtype == dtype
    found, wanted = (np.asarray(y, np.float32) for y in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=error, atol=error)


@pytest.mark.parametrize(
  ("qk_norm", "capability", "up_to", "products"),
  [
    (True, (9, 0), 10, 1),
    (False, (9, 0), 10, 3),  # XLA fuses what follows
    (True, (9, 0), 9, 3),  # ten tokens
    (True, (7, 5), 10, 3),  # no kernel
    (True, None, 10, 3),
  ],
)
def test_heads_of_few_tokens_are_merged_on_a_card(
  config, monkeypatch, qk_norm, capability, up_to, products
):
  monkeypatch.setattr(device, "nvidia_compute_capability", lambda: capability)
  monkeypatch.setattr(attention_layer, "_MERGED_UP_TO", up_to)
  layer = attention(dataclasses.replace(config, qk_norm=qk_norm), jnp.float32)
  x = jnp.ones((2, 5, config.embed_dim))
  turn = rope.cos_sin(jnp.zeros((2, 5), jnp.int32), config)
  jaxpr = str(jax.make_jaxpr(lambda x: layer.project(x, *turn))(x))
  assert jaxpr.count("dot_general") == products


def test_a_projection_of_another_kind_is_not_merged(config):
  layer = attention(config, jnp.float32)
  layer.q_proj = nnx.LoRALinear(
    *layer.q_proj.kernel.shape, lora_rank=2, rngs=nnx.Rngs(1)
  )
  layer.q_proj.lora.lora_b[...] += 1.0
  x = jax.random.normal(jax.random.key(1), (1, 2, config.embed_dim))
  turn = rope.cos_sin(jnp.asarray([[0, 1]]), config)
  expected = layer.project(x, *turn)
  with dispatch.preferring(head_rotation="reference"):
    found = layer.project(x, *turn)
  np.testing.assert_array_equal(found[0], expected[0])
