# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel in TPU interpret mode: numbers, copies and semaphores."""

import functools

import pytest

from pallas_kernels.block_sparse_attention import api, mosaic_tpu
from tests.pallas_kernels.block_sparse_attention import suite


class TestMosaicTpuInterpreted(suite.InterpretedSuite):
  implementation = "mosaic_tpu"

  @pytest.fixture(autouse=True)
  def interpret(self, monkeypatch):
    interpreted = functools.partial(
      mosaic_tpu.block_sparse_attention, interpret=True
    )
    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_tpu", interpreted)
