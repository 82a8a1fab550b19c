# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import xla
from tests import helpers
from tests.pallas_kernels.block_sparse_attention import suite


@pytest.mark.optimised
class TestXla(suite.JittedSuite):
  implementation = "xla"

  @pytest.mark.parametrize("blocks_per_step", [1, 2, 3, 8])
  def test_steps_of_any_length(self, blocks_per_step):
    arrays, settings, kept = suite.make_case("ragged")
    batch = arrays[0].shape[0]
    out, _ = xla.block_sparse_attention(
      *arrays,
      jnp.broadcast_to(settings["q_offset"], (batch,)),
      jnp.broadcast_to(settings["kv_len"], (batch,)),
      block_q=settings["block_q"],
      block_kv=settings["block_kv"],
      causal=True,
      scale=0.25,
      step_kv=settings["block_kv"] * blocks_per_step,
    )
    expected, _ = helpers.numpy_attention(*arrays[:3], kept, scale=0.25)
    helpers.assert_same(out, expected, 2e-6)

  def test_lists_shorter_than_a_step(self):
    (q, k, v, indices, _), settings, _ = suite.make_case("square")
    lists = (indices[..., :2], jnp.full(indices.shape[:3], 2, jnp.int32))

    def loss(implementation, *args):
      out, _ = suite.pallas_kernels.block_sparse_attention(
        *args, *lists, **settings, implementation=implementation
      )
      return jnp.sum(out**2)

    gradient = jax.jit(jax.value_and_grad(loss, (1, 2, 3)), static_argnums=0)
    actual = gradient("xla", q, k, v)
    expected = gradient("reference", q, k, v)
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
      helpers.assert_same(a, e, 3e-6)

  def test_memory_is_linear_in_length(self):
    def loss(*arrays):
      out, _ = suite.pallas_kernels.block_sparse_attention(
        *arrays, implementation="xla"
      )
      return out.sum()

    def temporary_bytes(length):
      q, k, v = helpers.make_qkv(q_len=length, head_dim=64)
      blocks = length // 128
      indices = jnp.zeros((1, 2, blocks, 4), jnp.int32)
      counts = jnp.full((1, 2, blocks), 4, jnp.int32)
      gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
      compiled = gradient.lower(q, k, v, indices, counts).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(8192)
    assert long < 4.5 * short

  def test_transpose_lists(self):
    indices, counts = helpers.random_lists(
      np.random.default_rng(0),
      batch=2,
      num_mask_heads=3,
      num_q_blocks=5,
      num_kv_blocks=7,
    )
    transposed, lengths = map(
      np.asarray, xla.transpose_lists(indices, counts, 7)
    )
    indices, counts = np.asarray(indices), np.asarray(counts)
    for b, h in np.ndindex(2, 3):
      pairs = {
        (i, int(j))
        for i in range(5)
        for j in indices[b, h, i, : counts[b, h, i]]
      }
      back = {
        (int(i), j)
        for j in range(7)
        for i in transposed[b, h, j, : lengths[b, h, j]]
      }
      assert pairs == back
