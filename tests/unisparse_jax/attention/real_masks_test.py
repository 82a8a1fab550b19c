# SPDX-License-Identifier: Apache-2.0
"""Attention of the shipped model on real text, with the masks chosen for it."""

import argparse
import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
import unisparse_jax
from tests import helpers
from tests.pallas_kernels.block_sparse_attention import long_ragged_test, suite
from unisparse_jax import attention, data, models

FOLDER = pathlib.Path(unisparse_jax.__file__).parent / "pretrained/pylib_12m"


@functools.cache
def captured(length, dtype):
  """(q, k, v) of every layer for the first tokens of a module's source."""
  tokens = data.Tokenizer.load(FOLDER).encode(inspect.getsource(argparse))
  model = models.load_hf(FOLDER, dtype=jnp.dtype(dtype))
  tokens = jnp.asarray(tokens[:length], jnp.int32)[None]
  assert tokens.shape == (1, length)
  return models.capture_qkv(
    model,
    tokens,
    attention_fn=attention.DenseAttention(implementation="tiled"),
  )


def check(layer, length, dtype, implementation, block, tolerances):
  """out, lse and gradients beside float32 attention with a mask of pairs."""
  q, k, v = captured(length, dtype)[layer]
  pattern = attention.UniSparse(top_p=0.9, block_q=block, block_kv=block)
  mask = jax.jit(pattern.select)(q, k)
  blocks = -(-length // block)
  density = float(mask.num_kv_blocks.mean()) / ((blocks + 1) / 2)
  assert 0.05 < density < 0.95  # neither trivial nor everything
  arrays = (q, k, v, mask.kv_block_indices, mask.num_kv_blocks)
  settings = dict(
    block_q=block,
    block_kv=block,
    scale=q.shape[-1] ** -0.5,
    kv_len=jnp.full((1,), length, jnp.int32),
  )
  op = functools.partial(
    pallas_kernels.block_sparse_attention, implementation=implementation
  )
  run = long_ragged_test.values_and_gradients
  actual = run(op, settings, dtype)(*arrays)
  with jax.default_matmul_precision("highest"):  # a GPU would round to TF32
    oracle = run(long_ragged_test.by_query_block, settings, dtype)
    expected = oracle(*suite.to_float32(arrays))
  for a, e, tolerance in zip(actual, expected, tolerances, strict=True):
    helpers.assert_same(a.astype(jnp.float32), e, tolerance)


@pytest.mark.optimised
@pytest.mark.parametrize("layer", [1, 6])
def test_xla_matches_with_real_masks(layer):
  check(layer, 500, "float32", "xla", 64, (2e-6, 2e-6, 1e-5, 1e-5, 1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("layer", range(8))
def test_real_masks_on_the_card(layer, block):
  gradient = suite.LOW_PRECISION_GRADIENT
  tolerances = (4e-3, 2e-6, *[gradient] * 3)
  check(layer, 4000, "bfloat16", "mosaic_gpu", block, tolerances)
