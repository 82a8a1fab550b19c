import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import columns, mosaic_gpu_common
from tests import helpers

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


@pytest.mark.parametrize("causal", [True, False])
def test_xla_matches_float64(causal):
  arrays, settings, kept = make_case(head_dim=16, causal=causal)
  out, lse = columns.column_attention(*arrays, **settings, implementation="xla")
  expected, expected_lse = helpers.numpy_attention(*arrays[:3], kept)
  helpers.assert_same(out, expected, 2e-6)
  helpers.assert_same(lse, expected_lse, 2e-6)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lowers_for_cuda(head_dim):
  try:
    mosaic_gpu_common.pallas()
  except NotImplementedError as error:
    pytest.skip(str(error))
  (*arrays, positions), settings, _ = make_case(jnp.bfloat16, head_dim)
  offset = settings["q_offset"]
  traced = jax.jit(
    lambda *args: columns.attend_on_hopper(*args, (BLOCK, True, 0.1))
  ).trace(*arrays, positions, offset)
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
def test_matches_float64_on_the_card(head_dim, causal):
  arrays, settings, kept = make_case(jnp.bfloat16, head_dim, causal)
  attend = functools.partial(
    columns.column_attention, **settings, implementation="mosaic_gpu"
  )
  out, lse = jax.jit(attend)(*arrays)
  expected, expected_lse = helpers.numpy_attention(*arrays[:3], kept)
  helpers.assert_same(out, expected, 4e-3)
  helpers.assert_same(lse, expected_lse, 4e-3)
