# SPDX-License-Identifier: Apache-2.0
"""The suite of column_score_sampling on every back end that a CPU can run."""

import functools

import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.column_score_sampling import api, mosaic_tpu, triton
from tests.pallas_kernels.column_score_sampling import suite


class TestReference(suite.BriefSuite):
  implementation = "reference"


@pytest.mark.optimised
class TestXla(suite.ColumnScoreSamplingSuite):
  implementation = "xla"


class TestTritonInterpreted(suite.BriefSuite):
  implementation = "triton"

  @pytest.fixture(autouse=True)
  def interpret(self, monkeypatch):
    interpreted = functools.partial(
      triton.column_score_sampling, interpret=True
    )
    monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", interpreted)


class TestMosaicTpuInterpreted(suite.BriefSuite):
  implementation = "mosaic_tpu"

  @pytest.fixture(autouse=True)
  def interpret(self, monkeypatch):
    interpreted = functools.partial(
      mosaic_tpu.column_score_sampling, interpret=True
    )
    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_tpu", interpreted)


@pytest.mark.gpu
class TestTriton(suite.ColumnScoreSamplingSuite):
  implementation = "triton"


def test_bad_positions_are_named():
  (q, k, positions), settings = suite.make_case("strided")
  for bad, message in (
    (positions[:, 1:], "positions must have shape"),
    (positions.astype(jnp.float32), "positions must have dtype int32"),
  ):
    with pytest.raises(ValueError, match=message):
      pallas_kernels.column_score_sampling(q, k, bad, **settings)
