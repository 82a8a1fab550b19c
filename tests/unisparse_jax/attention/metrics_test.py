# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np

from tests import helpers
from tests.unisparse_jax.attention import sparse_attention_test
from unisparse_jax import attention


def dense_probabilities(q, k, visible):
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
  logits = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
  p = np.exp(np.where(visible, logits, -np.inf))
  return p / p.sum(-1, keepdims=True)


def test_recall_and_block_mass_match_float64():
  q, k, _ = helpers.make_qkv(batch=2, q_len=70, kv_len=100)
  where = dict(q_offset=jnp.asarray([30, 12]), kv_len=jnp.asarray([100, 82]))
  mask = sparse_attention_test.random_mask(q, k, **where)
  kept = sparse_attention_test.boolean_mask(mask, 4)
  full = attention.BlockMask.full(mask.grid)
  visible = sparse_attention_test.boolean_mask(full, 4)
  p = dense_probabilities(q, k, visible)
  recall = attention.metrics.recall(q, k, mask)
  np.testing.assert_allclose(
    recall, np.moveaxis((p * kept).sum(-1), 1, 2), atol=1e-6
  )
  mass = attention.metrics.block_mass(q, k, mask.grid)
  padded = np.pad(p, ((0, 0), (0, 0), (0, 26), (0, 12)))
  by_block = padded.reshape(2, 4, 3, 32, 7, 16).sum((3, 5))
  rows = np.asarray([32, 32, 6])[:, None]
  np.testing.assert_allclose(mass, by_block / rows, atol=1e-6)


@jax.jit
def recall_twice(q, k, v):
  where = dict(q_offset=jnp.asarray([30, 12]), kv_len=jnp.asarray([100, 0]))
  pattern = attention.Streaming(num_sink=8, num_local=8, block_q=16, block_kv=8)
  mask = pattern.select(q, k, **where)
  full = attention.BlockMask.full(mask.grid)
  lse, dense_lse = (
    attention.sparse_attention(q, k, v, m, return_lse=True)[1]
    for m in (mask, full)
  )
  return (
    attention.metrics.recall_from_lse(lse, dense_lse),
    attention.metrics.recall(q, k, mask),
  )


def test_recall_from_lse_is_recall():
  found, expected = recall_twice(
    *helpers.make_qkv(batch=2, q_len=70, kv_len=100)
  )
  np.testing.assert_allclose(found, expected, atol=3e-6)
  assert expected[0].min() < 0.5  # the mask does drop something
  assert (expected[1] == 1.0).all()  # there is nothing to drop


def test_output_error():
  reference = jnp.asarray([3.0, 4.0])
  error = attention.metrics.output_error(reference * 1.1, reference)
  np.testing.assert_allclose(error["relative_l1"], 0.1, rtol=1e-5)
  np.testing.assert_allclose(error["relative_l2"], 0.1, rtol=1e-5)
  np.testing.assert_allclose(error["cosine"], 1.0, rtol=1e-6)
