# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels: lowered for CUDA on any machine, run on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import device
from pallas_kernels.block_sparse_attention import (
  arg_specs,
  mosaic_gpu,
  mosaic_gpu_backward,
  mosaic_gpu_common,
  xla,
)
from tests import helpers
from tests.pallas_kernels.block_sparse_attention import suite


def lower(
  spec, *, block_q=128, block_kv=128, num_mask_heads=None, gradient=False, **kw
):
  """Lowers the op for CUDA; ragged lengths, two sequences."""
  q_len, kv_len = 1000, 1001
  dtype = kw.pop("dtype", jnp.bfloat16)
  heads = num_mask_heads or spec.num_kv_heads
  struct = jax.ShapeDtypeStruct
  q = struct((2, q_len, spec.num_heads, spec.head_dim), dtype)
  k = struct((2, kv_len, spec.num_kv_heads, spec.head_dim), dtype)
  blocks = (-(-q_len // block_q), -(-kv_len // block_kv))
  lists = struct((2, heads, *blocks), jnp.int32)
  counts = struct((2, heads, blocks[0]), jnp.int32)
  scalar = struct((2,), jnp.int32)
  settings = dict(block_q=block_q, block_kv=block_kv, scale=0.1, **kw)
  settings.setdefault("causal", True)

  def run(q, k, v, *lists):
    return mosaic_gpu.attention(q, k, v, *lists, **settings)

  def loss(*args):
    out, lse = run(*args)
    return out.astype(jnp.float32).sum() + lse.sum()

  fn = jax.grad(loss, argnums=(0, 1, 2)) if gradient else run
  traced = jax.jit(fn).trace(q, k, k, lists, counts, scalar, scalar)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", ["llama3_8b", "gemma2_9b", "pylib_12m"])
def test_lowers_for_models(name):
  assert "mosaic_gpu" in lower(arg_specs.MODELS[name])


@pytest.mark.parametrize(
  "settings",
  [
    dict(block_q=64, block_kv=64),  # two heads share a tile
    dict(block_q=64, block_kv=128, num_mask_heads=32),  # one warpgroup
    dict(block_kv=64, causal=False, dtype=jnp.float16),
  ],
)
def test_lowers_for_settings(settings):
  assert "mosaic_gpu" in lower(arg_specs.MODELS["llama3_8b"], **settings)


@pytest.mark.parametrize(
  ("name", "block", "dtype"),
  [("pylib_12m", 64, "bfloat16"), ("llama3_8b", 128, "float16")],
)
def test_gradient_lowers(name, block, dtype):
  text = lower(
    arg_specs.MODELS[name],
    block_q=block,
    block_kv=block,
    dtype=jnp.dtype(dtype),
    gradient=True,
  )
  # The forward kernel and two of the backward pass.
  assert text.count("@mosaic_gpu") == 3


def test_wide_heads_take_the_xla_gradient():
  q, k, v = helpers.make_qkv(
    q_len=64, num_heads=1, num_kv_heads=1, head_dim=256
  )
  lists = (
    jnp.zeros((1, 1, 1, 1), jnp.int32),
    jnp.ones((1, 1, 1), jnp.int32),
    jnp.zeros((1,), jnp.int32),
    jnp.full((1,), 64, jnp.int32),
  )
  settings = dict(block_q=64, block_kv=64, causal=True, scale=0.1)

  def attend(q, k, v):
    return xla.block_sparse_attention(q, k, v, *lists, **settings)

  (out, lse), gradient = jax.vjp(attend, q, k, v)
  cotangents = (jnp.cos(out), jnp.sin(lse))
  actual = mosaic_gpu._attention_bwd(
    (*settings.values(), None), (q, k, v, *lists, out, lse), cotangents
  )
  for a, e in zip(actual, gradient(cotangents), strict=False):
    helpers.assert_same(a, e, 1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(head_dim=16), r"head_dim of \(64, 128, 256\); got head_dim=16"),
    (dict(dtype=jnp.float32), r"dtype of .*; got dtype='float32'"),
    (dict(block_q=32), r"block_q of \(64, 128\); got block_q=32"),
  ],
)
def test_refusals_name_the_reason(changes, message):
  settings = dict(head_dim=64, dtype=jnp.bfloat16, block_q=128) | changes
  q = jnp.zeros((1, 128, 1, settings["head_dim"]), settings["dtype"])
  with pytest.raises(NotImplementedError, match=message):
    mosaic_gpu.check_supported(q, settings["block_q"], 128)


@pytest.mark.skipif(device.is_hopper(), reason="this device can")
def test_refuses_other_devices():
  q = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
  lists = jnp.zeros((1, 1, 1, 1), jnp.int32)
  with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
    pallas_kernels.block_sparse_attention(
      q, q, q, lists, lists[..., 0], implementation="mosaic_gpu"
    )


@pytest.mark.parametrize(
  ("num_heads", "num_rows", "tiles_per_row"),
  [(1, 1003, 1), (8, 256, 1), (8, 32, 4), (32, 64, 1), (8, 1024, 4)],
)
def test_turns_cover_every_tile_once_with_even_work(
  num_heads, num_rows, tiles_per_row
):
  num_ctas = 132
  rng = np.random.default_rng(0)
  work = rng.permuted(
    np.tile(np.arange(1, num_rows + 1), (num_heads, 1)), axis=1
  )
  order = mosaic_gpu_common.longest_first(
    jnp.asarray(work), tiles_per_row, num_ctas
  )
  work = work.reshape(-1)[np.repeat(np.asarray(order), tiles_per_row)]
  seen, loads = [], []
  for cta in range(num_ctas):
    turns, tile_at = mosaic_gpu_common.rounds(
      len(work), num_ctas, jnp.int32(cta)
    )
    mine = np.asarray(tile_at(jnp.arange(int(turns))))
    seen += list(mine)
    loads.append(work[mine].sum())
  assert sorted(seen) == list(range(len(work)))
  assert max(loads) < 1.05 * np.mean(loads)


def test_longest_first_within_heads_where_that_is_even():
  work = np.array([[1, 3, 2], [5, 5, 9]])
  longest_first = mosaic_gpu_common.longest_first
  # One thread block: any order is even. Two: only all rows in one order.
  np.testing.assert_array_equal(
    longest_first(jnp.asarray(work), 1, 1), [1, 2, 0, 5, 3, 4]
  )
  np.testing.assert_array_equal(
    longest_first(jnp.asarray(work), 1, 2), [5, 3, 4, 1, 2, 0]
  )


def test_transposed_lists_and_their_masked_prefix():
  rng = np.random.default_rng(0)
  indices, counts = helpers.random_lists(
    rng, batch=2, num_mask_heads=3, num_q_blocks=5, num_kv_blocks=7
  )
  offset, kv_len = jnp.array([100, 0]), jnp.array([400, 448])
  transposed = mosaic_gpu_backward.transpose_lists(
    indices,
    counts,
    offset,
    kv_len,
    block_q=64,
    block_kv=64,
    causal=True,
    num_kv_blocks=7,
  )
  q_blocks, starts, lengths, masked = map(np.asarray, transposed)
  expected, expected_lengths = map(
    np.asarray, xla.transpose_lists(indices, counts, 7)
  )
  np.testing.assert_array_equal(lengths, expected_lengths)
  for b, h, j in np.ndindex(2, 3, 7):
    start, length = int(starts[b, h, j]), int(lengths[b, h, j])
    rows = q_blocks[b, h, start : start + length]
    np.testing.assert_array_equal(rows, expected[b, h, j, :length])
    seen = np.minimum(int(kv_len[b]), int(offset[b]) + rows * 64 + 1)
    needs_mask = (j + 1) * 64 > seen
    prefix = np.arange(length) < int(masked[b, h, j])
    np.testing.assert_array_equal(needs_mask, prefix)


CARD_CASES = {  # the names of the suite, at sizes that the kernels serve
  "square": (1, 512, 512, 4, 2, 4, 128, (128, 128), True, 0, None),
  "shared_mask": (2, 512, 512, 4, 2, 1, 64, (64, 64), True, 0, None),
  "ragged": (2, 400, 777, 6, 2, 2, 128, (64, 128), True, (377, 20), (777, 700)),
  "bidirectional": (1, 260, 177, 6, 3, 2, 64, (128, 64), False, 0, 170),
  "one_query_block": (1, 7, 513, 8, 1, 8, 128, (128, 128), True, 506, None),
  "no_gqa": (1, 256, 256, 3, 3, 3, 64, (128, 64), True, 0, None),
  # More tiles than multiprocessors, and pairs of heads that share loads.
  "many_tiles": (1, 2048, 2048, 16, 4, 4, 128, (128, 128), True, 0, None),
  "many_narrow": (1, 2048, 2048, 16, 4, 4, 64, (64, 64), True, 0, None),
  "wide_heads": (2, 300, 400, 4, 2, 2, 256, (128, 128), True, 100, None),
}
CARD_TOLERANCE = {"bfloat16": 4e-3, "float16": 1e-3}


@pytest.mark.gpu
class TestOnTheCard(suite.JittedSuite):
  implementation = "mosaic_gpu"

  @pytest.fixture(autouse=True)
  def sizes_of_the_card(self, monkeypatch):
    make_case = suite.make_case

    def low_precision(name, dtype=jnp.bfloat16, minimum=0):
      return make_case(name, dtype, minimum)

    monkeypatch.setattr(suite, "CASES", CARD_CASES)
    monkeypatch.setattr(suite, "make_case", low_precision)
    tolerance = {**CARD_TOLERANCE, "float32": CARD_TOLERANCE["bfloat16"]}
    monkeypatch.setattr(suite, "TOLERANCE", tolerance)

  @pytest.mark.parametrize("name", CARD_CASES)
  @pytest.mark.parametrize("dtype", CARD_TOLERANCE)
  def test_matches_float64(self, name, dtype):
    super().test_matches_float64(name, dtype)

  @pytest.mark.parametrize("dtype", CARD_TOLERANCE)
  def test_extreme_logits(self, dtype):
    super().test_extreme_logits(dtype)

  @pytest.mark.parametrize("number_of_blocks", ["all", "one"])
  def test_uniform_rows(self, number_of_blocks):
    (q, k, v, indices, counts), settings, _ = suite.make_case("ragged")
    count = indices.shape[-1] if number_of_blocks == "all" else 1
    counts = jnp.full_like(counts, count)
    out, lse = self.run((q, k, v, indices, counts), settings)
    reference = functools.partial(
      pallas_kernels.block_sparse_attention,
      **settings,
      implementation="reference",
    )
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected, expected_lse = jax.jit(reference)(*wide, indices, counts)
    helpers.assert_same(out, expected, CARD_TOLERANCE["bfloat16"])
    helpers.assert_same(lse, expected_lse, CARD_TOLERANCE["bfloat16"])

  @pytest.mark.parametrize(
    ("name", "dtype"),
    [
      *[
        (name, "bfloat16")
        for name in ("shared_mask", "ragged", "bidirectional", "many_tiles")
      ],
      ("wide_heads", "bfloat16"),
      ("many_narrow", "float16"),
    ],
  )
  def test_gradients_match_reference(self, name, dtype):
    arrays, settings, _ = suite.make_case(name, jnp.dtype(dtype))
    on_the_card = suite.gradient_of(settings, "mosaic_gpu", dtype)
    reference = suite.gradient_of(settings, "reference", dtype)
    for inputs in suite.extremes(arrays).values():
      actual, again = (on_the_card(*inputs) for _ in range(2))
      with jax.default_matmul_precision("highest"):
        expected = reference(*suite.to_float32(inputs))
      for a, b, e in zip(actual, again, expected, strict=True):
        helpers.assert_same(
          a.astype(jnp.float32), e, suite.LOW_PRECISION_GRADIENT
        )
        np.testing.assert_array_equal(
          np.asarray(a, np.float32), np.asarray(b, np.float32)
        )
