# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel: interpreted on a CPU, lowered for CUDA, run on a card."""

import functools

import pytest

from pallas_kernels.block_sparse_attention import api, triton
from tests.pallas_kernels.block_sparse_attention import suite


class TestTritonInterpreted(suite.InterpretedSuite):
  implementation = "triton"

  @pytest.fixture(autouse=True)
  def interpret(self, monkeypatch):
    interpreted = functools.partial(
      triton.block_sparse_attention, interpret=True
    )
    monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", interpreted)


@pytest.mark.gpu
class TestTriton(suite.JittedSuite):
  implementation = "triton"
