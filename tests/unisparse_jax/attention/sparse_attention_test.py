# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from tests import helpers
from unisparse_jax import attention

attend = jax.jit(attention.sparse_attention, static_argnames="return_lse")
columns_of = jax.jit(attention.ColumnSet.from_dense, static_argnums=1)
mask_of = jax.jit(attention.BlockMask.from_dense)


def boolean_mask(mask, num_heads):
  """A mask with columns as booleans [batch, heads, q_len, kv_len]."""
  g = mask.grid
  query, key = np.arange(g.q_len)[:, None], np.arange(g.kv_capacity)[None, :]
  listed = np.asarray(mask.to_dense())[
    ..., query // g.block_q, key // g.block_kv
  ]
  listed = np.repeat(listed, num_heads // listed.shape[1], axis=1)
  if mask.columns is not None:
    columns = np.asarray(mask.columns.to_dense(g.kv_capacity))
    columns = np.repeat(columns, num_heads // columns.shape[1], axis=1)
    listed = listed | columns[:, :, None, :]
  for b in range(g.batch):
    visible = key < int(g.kv_len[b])
    if g.causal:
      visible = visible & (key <= query + int(g.q_offset[b]))
    listed[b] &= visible
  return listed


def random_mask(q, k, *, num_mask_heads=2, columns=True, causal=True, **where):
  rng = np.random.default_rng(3)
  g = attention.BlockGrid.create(
    q, k, block_q=32, block_kv=16, causal=causal, **where
  )
  shape = (g.batch, num_mask_heads, g.num_q_blocks, g.num_kv_blocks)
  column_set = None
  if columns:
    kept = jnp.asarray(rng.random((*shape[:2], k.shape[1])) < 0.1)
    column_set = columns_of(kept, 40)
  kept = jnp.asarray(rng.random(shape) < 0.3)
  return mask_of(g, kept, columns=column_set)


@pytest.mark.parametrize("num_mask_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_and_columns_match_float64(num_mask_heads, causal):
  q, k, v = helpers.make_qkv(
    batch=2, q_len=100, kv_len=150, num_heads=6, num_kv_heads=2
  )
  mask = random_mask(
    q,
    k,
    num_mask_heads=num_mask_heads,
    causal=causal,
    q_offset=jnp.asarray([50, 10]),
    kv_len=jnp.asarray([150, 111]),
  )
  out, lse = attend(q, k, v, mask, return_lse=True)
  kept = boolean_mask(mask, 6)
  expected, expected_lse = helpers.numpy_attention(q, k, v, kept)
  helpers.assert_same(out, expected, 2e-6)
  helpers.assert_same(lse, expected_lse, 2e-6)


def test_one_column_more_is_seen():
  q, k, v = helpers.make_qkv(q_len=96)
  mask = random_mask(q, k)
  kept = boolean_mask(mask, 4)
  expected, _ = helpers.numpy_attention(q, k, v, kept)
  helpers.assert_same(attend(q, k, v, mask), expected, 2e-6)
  missing = np.argwhere(~kept[0, 0, -1])[0]
  kept[0, 0, -1, missing] = True
  expected, _ = helpers.numpy_attention(q, k, v, kept)
  with pytest.raises(AssertionError):
    helpers.assert_same(attend(q, k, v, mask), expected, 2e-6)


@pytest.mark.optimised
def test_gradients_through_blocks_and_columns():
  q, k, v = helpers.make_qkv(q_len=96)
  mask = random_mask(q, k)
  # The diagonal keeps every row non-empty for the library's softmax.
  mask = mask.union(
    attention.Streaming(num_local=1, block_q=32, block_kv=16).select(q, k)
  )
  kept = jnp.asarray(boolean_mask(mask, 4))

  def ours(q, k, v):
    return (attention.sparse_attention(q, k, v, mask) ** 2).sum()

  def library(q, k, v):
    return (jax.nn.dot_product_attention(q, k, v, mask=kept) ** 2).sum()

  actual = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(q, k, v)
  expected = jax.jit(jax.grad(library, argnums=(0, 1, 2)))(q, k, v)
  for a, e in zip(actual, expected, strict=True):
    helpers.assert_same(a, e, 5e-6)


class _WithoutGradient:
  """As on a GPU, where kernels without a rule for derivatives score blocks."""

  def select(self, q, k, **where):
    @jax.custom_jvp
    def kernel(q):
      return q

    @kernel.defjvp
    def refuse(primals, tangents):
      raise NotImplementedError("no rule")

    return attention.UniSparse(top_p=0.8, block_q=32, block_kv=32).select(
      kernel(q), k, **where
    )


def test_gradient_does_not_ask_the_selection_for_one():
  q, k, v = helpers.make_qkv(
    batch=1, q_len=64, kv_len=64, num_heads=2, num_kv_heads=1, head_dim=16
  )
  sparse = attention.SparseAttention(
    pattern=_WithoutGradient(), implementation="xla"
  )
  gradients = jax.jit(jax.grad(lambda *x: sparse(*x).sum(), argnums=(0, 1, 2)))
  assert all(bool(jnp.abs(g).max() > 0) for g in gradients(q, k, v))


def test_merge_of_two_halves_is_the_whole():
  q, k, v = helpers.make_qkv(q_len=64)
  kept = np.tril(np.ones((1, 4, 64, 64), bool))
  left, right = kept.copy(), kept.copy()
  left[..., 20:] = False
  right[..., :20] = False
  parts = [
    tuple(
      jnp.asarray(x, jnp.float32)
      for x in helpers.numpy_attention(q, k, v, part)
    )
    for part in (left, right)
  ]
  out, lse = attention.merge(*parts)
  expected, expected_lse = helpers.numpy_attention(q, k, v, kept)
  helpers.assert_same(out, expected, 1e-6)
  helpers.assert_same(lse, expected_lse, 1e-6)
  empty = (jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf))
  out, lse = attention.merge(empty, empty)
  assert not out.any() and jnp.isneginf(lse).all()


@pytest.mark.parametrize("implementation", ["tiled", "xla"])
@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention(implementation, causal):
  q, k, v = helpers.make_qkv(batch=2, q_len=40, kv_len=60)
  out = attention.dense_attention(
    q,
    k,
    v,
    causal=causal,
    q_offset=jnp.asarray([20, 5]),
    kv_len=jnp.asarray([60, 45]),
    implementation=implementation,
  )
  key, query = np.arange(60)[None, :], np.arange(40)[:, None]
  kept = np.empty((2, 4, 40, 60), bool)
  for b, (offset, length) in enumerate([(20, 60), (5, 45)]):
    kept[b] = (key < length) & ((key <= query + offset) | (not causal))
  expected, _ = helpers.numpy_attention(q, k, v, kept)
  helpers.assert_same(out, expected, 1e-6)


def test_prompts_of_several_lengths_go_to_cudnn(monkeypatch):
  q, k, v = (
    x.astype(jnp.bfloat16)
    for x in helpers.make_qkv(batch=2, q_len=40, kv_len=40)
  )
  asked, library = [], jax.nn.dot_product_attention

  def in_place_of_cudnn(*args, **kwargs):
    asked.append(kwargs)
    return library(*args, **kwargs | {"implementation": "xla"})

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax.nn, "dot_product_attention", in_place_of_cudnn)
  lengths = jnp.asarray([40, 23])
  out = attention.dense_attention(q, k, v, kv_len=lengths)
  (call,) = asked
  assert call["implementation"] == "cudnn" and call["is_causal"]
  assert call["mask"] is None
  expected = attention.dense_attention(
    q, k, v, kv_len=lengths, implementation="tiled"
  )
  for row, length in enumerate(lengths):
    helpers.assert_same(out[row, :length], expected[row, :length], 1e-2)
  # Later positions, or keys that all queries would see, want a mask.
  attention.dense_attention(q, k, v, kv_len=lengths, q_offset=lengths)
  attention.dense_attention(q, k, v, kv_len=lengths, causal=False)
  assert len(asked) == 1


def test_plug_in_of_nnx_attention():
  layer = nnx.MultiHeadAttention(
    4,
    32,
    decode=False,
    rngs=nnx.Rngs(0),
    attention_fn=nnx.dot_product_attention,
  )
  x = jax.random.normal(jax.random.key(0), (2, 70, 32))
  causal = nnx.make_causal_mask(jnp.ones((2, 70)))
  call = nnx.jit(lambda layer, x, mask=None: layer(x, mask=mask))
  expected = call(layer, x, causal)
  sparse = attention.SparseAttention(
    pattern=attention.UniSparse(
      top_p=1.0, block_q=32, block_kv=32, head_group=1
    )
  )
  layer.attention_fn = attention.as_flax_attention(sparse)
  helpers.assert_same(call(layer, x), expected, 1e-6)
  with pytest.raises(ValueError, match="mask must be None"):
    layer(x, mask=causal)


def test_plug_in_of_linen_attention():
  x = jax.random.normal(jax.random.key(0), (2, 70, 32))
  plain = nn.MultiHeadDotProductAttention(num_heads=4)
  params = plain.init(jax.random.key(1), x)
  causal = nn.make_causal_mask(jnp.ones((2, 70)))
  expected = plain.apply(params, x, mask=causal)
  pattern = attention.Streaming(num_local=70, block_q=32, block_kv=32)
  sparse = nn.MultiHeadDotProductAttention(
    num_heads=4,
    attention_fn=attention.as_flax_attention(
      attention.SparseAttention(pattern=pattern)
    ),
  )
  helpers.assert_same(sparse.apply(params, x), expected, 1e-6)


def test_dense_below():
  q, k, v = helpers.make_qkv(q_len=128)
  pattern = attention.Streaming(
    num_sink=0, num_local=1, block_q=16, block_kv=16
  )
  always = attention.SparseAttention(pattern=pattern)
  fallback = attention.SparseAttention(pattern=pattern, dense_below=129)
  expected, below, sparse = jax.jit(
    lambda q, k, v: (
      attention.dense_attention(q, k, v),
      fallback(q, k, v),
      always(q, k, v),
    )
  )(q, k, v)
  helpers.assert_same(below, expected, 1e-6)
  assert helpers.relative_error(sparse, expected) > 0.1


def test_mask_of_another_length_is_refused():
  q, k, v = helpers.make_qkv(q_len=64)
  mask = attention.Dense().select(q[:, :32], k)
  with pytest.raises(ValueError, match=r"mask must be made for q's"):
    attention.sparse_attention(q, k, v, mask)
