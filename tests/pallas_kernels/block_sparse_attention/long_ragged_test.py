# SPDX-License-Identifier: Apache-2.0
"""Long ragged batches, beside float32 attention by blocks of queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pallas_kernels
from pallas_kernels.block_sparse_attention import mosaic_gpu
from tests import helpers
from tests.pallas_kernels.block_sparse_attention import suite

# name: tokens of each row, heads, kv heads, mask heads, head_dim, blocks; rows
# are padded to the longest.
CASES = {
  "short": ((190, 121, 7), 4, 2, 2, 16, (32, 16)),
  "long": ((8190, 5001, 77), 4, 2, 2, 128, (128, 128)),
  "long_narrow": ((8190, 5001, 77), 4, 2, 1, 64, (64, 128)),
}
TOLERANCE = {"bfloat16": 4e-3, "float16": 1e-3}


def make_case(name, dtype="float32"):
  lengths, num_heads, num_kv_heads, num_mask_heads, head_dim, block = CASES[
    name
  ]
  q, k, v = helpers.make_qkv(
    batch=len(lengths),
    q_len=max(lengths),
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    dtype=jnp.dtype(dtype),
  )
  indices, counts = helpers.random_lists(
    np.random.default_rng(1),
    batch=len(lengths),
    num_mask_heads=num_mask_heads,
    num_q_blocks=-(-max(lengths) // block[0]),
    num_kv_blocks=-(-max(lengths) // block[1]),
  )
  settings = dict(
    block_q=block[0],
    block_kv=block[1],
    scale=1.5 * head_dim**-0.5,
    kv_len=jnp.asarray(lengths, jnp.int32),
  )
  return (q, k, v, indices, counts), settings


def by_query_block(
  q, k, v, indices, counts, *, block_q, block_kv, scale, kv_len
):
  """Causal out and lse in float32, from masks of pairs; gradients likewise."""
  batch, q_len, num_heads, head_dim = q.shape
  _, num_mask_heads, num_q_blocks, num_slots = indices.shape
  k, v = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (k, v))
  key = jnp.arange(k.shape[1])
  pad = num_q_blocks * block_q - q_len
  q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  q = q.reshape(batch, num_q_blocks, block_q, num_heads, head_dim)

  @jax.checkpoint
  def attend(operands):
    index, q_block, blocks, count = operands
    is_listed = jnp.arange(num_slots)[None, None] < count[..., None]
    blocks = jnp.where(is_listed, blocks, -1)
    kept = blocks[..., None] == (key // block_kv)[None, None, None]
    kept = kept.any(2)  # [batch, masks, kv]
    kept = jnp.repeat(kept, num_heads // num_mask_heads, axis=1)[:, :, None]
    kept &= key[None, None, None] < kv_len[:, None, None, None]
    row = index * block_q + jnp.arange(block_q)
    kept &= (key[None, :] <= row[:, None])[None, None]
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q_block, k)
    top = jnp.where(kept, logits, -1e30).max(-1, keepdims=True)
    top = lax.stop_gradient(top)
    p = jnp.where(kept, jnp.exp(jnp.where(kept, logits - top, 0.0)), 0.0)
    total = p.sum(-1, keepdims=True)
    safe = jnp.where(total == 0.0, 1.0, total)
    lse = jnp.where(total == 0.0, -jnp.inf, top + jnp.log(safe))[..., 0]
    return jnp.einsum("bhqk,bkhd->bqhd", p / safe, v), lse

  by_block = (
    jnp.arange(num_q_blocks),
    jnp.moveaxis(q, 1, 0),
    jnp.moveaxis(indices, 2, 0),
    jnp.moveaxis(counts, 2, 0),
  )
  out, lse = lax.map(attend, by_block)
  out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, num_heads, head_dim)
  lse = jnp.moveaxis(lse, 0, 2).reshape(batch, num_heads, -1)
  return out[:, :q_len], jnp.swapaxes(lse, 1, 2)[:, :q_len]


def values_and_gradients(op, settings, dtype):
  """A jitted function of the arrays: out, lse, and gradients by q, k and v."""

  def wave(fn, x):
    return fn(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

  @jax.jit
  def run(q, k, v, *lists):
    (out, lse), pull = jax.vjp(
      lambda q, k, v: op(q, k, v, *lists, **settings), q, k, v
    )
    d_out = wave(jnp.cos, out).astype(dtype).astype(out.dtype)
    # A row without keys has no lse to ask for.
    d_lse = jnp.where(jnp.isinf(lse), 0.0, wave(jnp.sin, lse))
    return out, lse, *pull((d_out, d_lse))

  return run


def check(name, dtype, implementation, tolerances):
  """Each sequence by itself: a long one would hide what a short one lacks."""
  arrays, settings = make_case(name, dtype)
  op = functools.partial(
    pallas_kernels.block_sparse_attention, implementation=implementation
  )
  run = values_and_gradients(op, settings, dtype)
  actual = run(*arrays)
  with jax.default_matmul_precision("highest"):  # a GPU would round to TF32
    oracle = values_and_gradients(by_query_block, settings, dtype)
    expected = oracle(*suite.to_float32(arrays))
  for a, e, tolerance in zip(actual, expected, tolerances, strict=True):
    for row in range(a.shape[0]):
      helpers.assert_same(a[row].astype(jnp.float32), e[row], tolerance)
  for a, b in zip(actual, run(*arrays), strict=True):
    np.testing.assert_array_equal(
      np.asarray(a, np.float32), np.asarray(b, np.float32)
    )


def test_query_blocks_match_float64():
  arrays, settings = make_case("short")
  *qkv, indices, counts = arrays
  out, lse = jax.jit(functools.partial(by_query_block, **settings))(*arrays)
  block_q, block_kv = settings["block_q"], settings["block_kv"]
  q_len = qkv[0].shape[1]
  kept = np.zeros((3, 4, q_len, q_len), bool)
  for b, h, i in np.ndindex(3, 4, indices.shape[2]):
    listed = np.asarray(indices[b, h // 2, i, : counts[b, h // 2, i]])
    seen = np.isin(np.arange(q_len) // block_kv, listed)
    kept[b, h, i * block_q : (i + 1) * block_q] = seen
  kept &= np.tril(np.ones((q_len, q_len), bool))
  kept &= np.arange(q_len) < np.array(CASES["short"][0])[:, None, None, None]
  expected = helpers.numpy_attention(*qkv, kept, scale=settings["scale"])
  for a, e in zip((out, lse), expected, strict=True):
    helpers.assert_same(a, e, 2e-6)


@pytest.mark.optimised
def test_xla_matches_a_short_batch():
  check("short", "float32", "xla", (2e-6, 2e-6, 3e-6, 3e-6, 3e-6))


def test_a_long_batch_lowers_for_cuda():
  arrays, settings = make_case("long", "bfloat16")
  settings["causal"] = True
  offset, lengths = jnp.zeros((3,), jnp.int32), settings.pop("kv_len")

  def on_hopper(*arrays, **settings):
    return mosaic_gpu.attention(*arrays, offset, lengths, **settings)

  run = values_and_gradients(on_hopper, settings, "bfloat16")
  text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu") == 3


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("name", "dtype"), [("long", "bfloat16"), ("long_narrow", "float16")]
)
def test_a_long_batch_on_the_card(name, dtype):
  forward, gradient = TOLERANCE[dtype], suite.LOW_PRECISION_GRADIENT
  check(name, dtype, "mosaic_gpu", (forward, 2e-6, *[gradient] * 3))
