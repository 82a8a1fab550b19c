# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.block_sparse_attention import columns
from tests import helpers

CARD_TOLERANCE = {"bfloat16": 4e-3, "float16": 1e-3}
BATCH, Q_LEN, HEADS, UNITS, COLUMNS, BLOCK = 2, 300, 8, 4, 200, 128


def make_case(dtype=jnp.float32, head_dim=64, causal=True):
  """Arrays, and which pairs are seen as bool [batch, heads, q, columns]."""
  rng = np.random.default_rng(0)
  q, k, v = helpers.make_qkv(
    batch=BATCH,
    q_len=Q_LEN,
    kv_len=COLUMNS,
    num_heads=HEADS,
    num_kv_heads=UNITS,
    head_dim=head_dim,
    dtype=dtype,
  )
  num_q_blocks = -(-Q_LEN // BLOCK)
  offset = np.array([3, 20], np.int32)
  position = np.stack(
    [rng.choice(Q_LEN + 20, COLUMNS, False) for _ in range(BATCH * UNITS)]
  ).reshape(BATCH, UNITS, 1, COLUMNS)
  is_seen = rng.random((BATCH, UNITS, num_q_blocks, COLUMNS)) < 0.6
  positions = np.where(is_seen, position, columns.NEVER).astype(np.int32)
  by_row = np.repeat(positions, BLOCK, axis=2)[:, :, :Q_LEN]
  limit = np.full((BATCH, Q_LEN), columns.NEVER - 1)
  if causal:
    limit = offset[:, None] + np.arange(Q_LEN)
  kept = by_row <= limit[:, None, :, None]
  kept = np.repeat(kept, HEADS // UNITS, axis=1)
  settings = dict(block_q=BLOCK, causal=causal, q_offset=jnp.asarray(offset))
  return (q, k, v, jnp.asarray(positions)), settings, kept


@pytest.mark.optimised
@pytest.mark.parametrize("causal", [True, False])
def test_xla_matches_float64(causal):
  arrays, settings, kept = make_case(head_dim=16, causal=causal)
  out, lse = columns.column_attention(*arrays, **settings, implementation="xla")
  expected, expected_lse = helpers.numpy_attention(*arrays[:3], kept)
  helpers.assert_same(out, expected, 2e-6)
  helpers.assert_same(lse, expected_lse, 2e-6)


def dense_attention(q, k, v, kept):
  """out and lse of all columns at once; kept: [batch, heads, q, columns]."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  logits = jnp.einsum("bqhd,bchd->bhqc", q, k) * q.shape[-1] ** -0.5
  top = jnp.where(kept, logits, -1e30).max(-1, keepdims=True)
  p = jnp.where(kept, jnp.exp(jnp.where(kept, logits - top, 0.0)), 0.0)
  total = p.sum(-1, keepdims=True)
  safe = jnp.where(total == 0.0, 1.0, total)
  lse = jnp.where(total == 0.0, -jnp.inf, top + jnp.log(safe))[..., 0]
  return jnp.einsum("bhqc,bchd->bqhd", p / safe, v), jnp.swapaxes(lse, 1, 2)


@pytest.mark.optimised
def test_gradients_match_dense_attention():
  (q, k, v, positions), settings, kept = make_case(head_dim=16)
  # The second block of queries sees no column of the first unit.
  positions = positions.at[0, 0, 1].set(columns.NEVER)
  kept[0, : HEADS // UNITS, BLOCK : 2 * BLOCK] = False
  attend = functools.partial(
    columns.column_attention,
    positions=positions,
    **settings,
    implementation="xla",
  )
  dense = functools.partial(dense_attention, kept=jnp.asarray(kept))

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(attend):
    (out, lse), pull = jax.vjp(attend, q, k, v)
    # A row without columns has no lse to ask for.
    return pull((jnp.cos(out), jnp.where(jnp.isinf(lse), 0.0, jnp.sin(lse))))

  for a, e in zip(gradient(attend), gradient(dense), strict=True):
    helpers.assert_same(a, e, 3e-6)


@pytest.mark.optimised
def test_gradients_of_many_blocks_are_summed_in_float32():
  num_blocks, block_q, count = 256, 8, 16
  q, k, v = helpers.make_qkv(
    q_len=num_blocks * block_q,
    kv_len=count,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    dtype=jnp.bfloat16,
  )
  positions = jnp.zeros((1, 1, num_blocks, count), jnp.int32)

  @jax.jit
  def gradient(q, k, v):
    attend = functools.partial(
      columns.column_attention,
      positions=positions,
      block_q=block_q,
      implementation="xla",
    )
    (_, lse), pull = jax.vjp(attend, q, k, v)
    return pull((jnp.flip(q, axis=1), jnp.zeros_like(lse)))

  expected = gradient(*(x.astype(jnp.float32) for x in (q, k, v)))
  for a, e in zip(gradient(q, k, v), expected, strict=True):
    helpers.assert_same(a.astype(jnp.float32), e, 6e-3)  # in bfloat16: 2e-2


@pytest.mark.parametrize(
  ("head_dim", "dtype"),
  [(64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (256, "float16")],
)
def test_lowers_for_cuda(head_dim, dtype, monkeypatch):
  monkeypatch.setattr(device, "is_hopper", lambda: True)
  arrays, settings, _ = make_case(jnp.dtype(dtype), head_dim)
  attend = functools.partial(
    columns.column_attention, **settings, implementation="mosaic_gpu"
  )
  traced = jax.jit(attend).trace(*arrays)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu") == 1


def test_bad_positions_are_named():
  (q, k, v, positions), settings, _ = make_case()
  with pytest.raises(ValueError, match=r"positions must have shape"):
    columns.column_attention(q, k, v, positions[:, :, 1:], **settings)


def test_back_ends_without_columns_use_xla():
  assert columns.with_columns("triton") == "xla"
  assert columns.with_columns(("triton", "mosaic_gpu")) == ("mosaic_gpu",)
  assert columns.with_columns(("triton",)) == "xla"
  assert columns.with_columns(None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", CARD_TOLERANCE)
def test_matches_float64_on_the_card(head_dim, causal, dtype):
  arrays, settings, kept = make_case(jnp.dtype(dtype), head_dim, causal)
  attend = functools.partial(
    columns.column_attention, **settings, implementation="mosaic_gpu"
  )
  attend = jax.jit(attend)
  out, lse = attend(*arrays)
  expected, expected_lse = helpers.numpy_attention(*arrays[:3], kept)
  helpers.assert_same(out, expected, CARD_TOLERANCE[dtype])
  helpers.assert_same(lse, expected_lse, CARD_TOLERANCE[dtype])
  for a, b in zip((out, lse), attend(*arrays), strict=True):
    np.testing.assert_array_equal(
      np.asarray(a, np.float32), np.asarray(b, np.float32)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("head_dim", "dtype"), [(64, "bfloat16"), (128, "float16"), (256, "bfloat16")]
)
def test_gradients_match_dense_attention_on_the_card(head_dim, dtype):
  (q, k, v, positions), settings, kept = make_case(jnp.dtype(dtype), head_dim)
  attend = functools.partial(
    columns.column_attention,
    positions=positions,
    **settings,
    implementation="mosaic_gpu",
  )
  dense = functools.partial(dense_attention, kept=jnp.asarray(kept))

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(attend, *arrays):
    (out, lse), pull = jax.vjp(attend, *arrays)
    d_out = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    d_out = d_out.astype(dtype).astype(out.dtype)
    return pull((d_out, jnp.where(jnp.isinf(lse), 0.0, 1.0)))

  actual, again = (gradient(attend, q, k, v) for _ in range(2))
  with jax.default_matmul_precision("highest"):  # a GPU would round to TF32
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = gradient(dense, *wide)
  for a, b, e in zip(actual, again, expected, strict=True):
    helpers.assert_same(a.astype(jnp.float32), e, 1e-2)
    np.testing.assert_array_equal(
      np.asarray(a, np.float32), np.asarray(b, np.float32)
    )
