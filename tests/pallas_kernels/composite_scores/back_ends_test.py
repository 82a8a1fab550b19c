# SPDX-License-Identifier: Apache-2.0
"""The suite of composite_scores on every back end that a CPU can run."""

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.composite_scores import api, mosaic_tpu, triton
from tests import helpers
from tests.pallas_kernels.composite_scores import suite


class TestReference(suite.BriefSuite):
  implementation = "reference"


@pytest.mark.optimised
class TestXla(suite.CompositeScoresSuite):
  implementation = "xla"


class TestTritonInterpreted(suite.BriefSuite):
  implementation = "triton"

  @pytest.fixture(autouse=True)
  def interpret(self, monkeypatch):
    interpreted = functools.partial(triton.composite_scores, interpret=True)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", interpreted)

  @pytest.mark.parametrize("name", suite.LONG_CASES)
  def test_long_in_several_tiles_and_strips(self, name, monkeypatch):
    # What no tile writes, sums behind the diagonal, is NaN here.
    monkeypatch.setattr(triton, "_long_tile_sizes", lambda *_: (16, 16, 4, 1))
    monkeypatch.setattr(triton, "_MAX_SUMS", 1 << 11)
    monkeypatch.setattr(triton, "_CHUNK_BYTES", 64)
    self.test_long_matches_float64(name)

  @pytest.mark.parametrize("blocks", [dict(block_q=128), dict(block_kv=24)])
  def test_bfloat16_in_blocks_that_fit_no_long_tile(self, blocks, monkeypatch):
    monkeypatch.setattr(triton, "_long_tile_sizes", lambda *_: (8, 16, 4, 1))
    (q, k, *counts), settings = suite.make_case("ragged")
    arrays = (q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), *counts)
    settings |= blocks
    expected = suite.numpy_scores(*arrays, **settings)
    helpers.assert_same(self.run(arrays, settings), expected, 1e-5)

  def test_long_refuses_blocks_of_other_sizes(self):
    arrays, settings = suite.make_long_case("square")
    with pytest.raises(NotImplementedError, match="block_kv // window_kv"):
      self.run(arrays, settings | dict(block_kv=24))


class TestMosaicTpuInterpreted(suite.BriefSuite):
  implementation = "mosaic_tpu"

  @pytest.fixture(autouse=True)
  def interpret(self, monkeypatch):
    interpreted = functools.partial(mosaic_tpu.composite_scores, interpret=True)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_tpu", interpreted)

  def test_long_matches_float64(self):
    arrays, settings = suite.make_long_case("square")
    with pytest.raises(NotImplementedError, match="one vector"):
      self.run(arrays, settings)

  test_long_in_bfloat16_and_the_largest = None
  test_long_of_equal_scores = None


@pytest.mark.gpu
class TestTriton(suite.CompositeScoresSuite):
  implementation = "triton"
  tolerance = 2e-3  # TensorFloat-32

  @pytest.mark.parametrize("stride", [8, 16])
  def test_long_at_the_size_of_a_benchmark(self, stride):
    q, k, _ = helpers.make_qkv(
      q_len=4000, num_heads=8, head_dim=128, dtype=jnp.bfloat16
    )
    counts = jnp.full((1, 4000 // stride), stride, jnp.int32)
    settings = dict(
      window_q=stride, window_kv=stride, parts=stride, scale=1 / stride
    )
    arrays = (q, k, counts, counts)
    expected = suite.numpy_scores(
      *arrays, **settings, block_q=128, block_kv=128, causal=True, q_offset=0
    )
    helpers.assert_same(self.run(arrays, settings), expected, 1e-5)
