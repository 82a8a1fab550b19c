# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention import masked_lists


def count(indices, counts, kv_len, causal):
  return masked_lists.prepare(
    indices,
    counts,
    jnp.array([128]),
    jnp.array([kv_len]),
    block_q=64,
    block_kv=64,
    causal=causal,
  )


def test_masked_blocks_are_counted_from_any_order():
  indices = jnp.array([[[[2, 1, 0], [0, 2, 1]]]], jnp.int32)
  counts = jnp.array([[[3, 2]]], jnp.int32)
  # Queries from 128 and 192 on; keys by 64, valid up to 180.
  same, masked = count(indices, counts, 180, True)
  np.testing.assert_array_equal(same, indices)
  np.testing.assert_array_equal(masked, [[[1, 2]]])
  _, masked = count(indices, counts, 192, False)
  np.testing.assert_array_equal(masked, [[[0, 0]]])


def test_lists_without_room_get_some():
  lists = jnp.zeros((1, 1, 2, 0), jnp.int32), jnp.zeros((1, 1, 2), jnp.int32)
  indices, masked = count(*lists, 180, True)
  assert indices.shape == (1, 1, 2, 1)
  np.testing.assert_array_equal(masked, [[[0, 0]]])
