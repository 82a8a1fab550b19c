# SPDX-License-Identifier: Apache-2.0
"""The suite of block_selection on every back end that a CPU can run."""

import functools

import pytest

import pallas_kernels
from pallas_kernels.block_selection import api, triton
from tests.pallas_kernels.block_selection import suite


class TestReference(suite.BriefSuite):
  implementation = "reference"


@pytest.mark.optimised
class TestXla(suite.BlockSelectionSuite):
  implementation = "xla"


class TestTritonInterpreted(suite.BriefSuite):
  implementation = "triton"

  @pytest.fixture(autouse=True)
  def interpret(self, monkeypatch):
    interpreted = functools.partial(triton.block_selection, interpret=True)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", interpreted)


@pytest.mark.gpu
class TestTriton(suite.BlockSelectionSuite):
  implementation = "triton"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(top_p=1.5), r"top_p must be in \(0, 1\]"),
    (dict(top_k=3), r"top_p must be given if and only if top_k is not"),
    (dict(max_blocks=0), r"max_blocks must be an integer >= 1"),
    (dict(block_kv=0), r"block_kv must be an integer >= 1"),
  ],
)
def test_bad_argument_is_named(changes, message):
  scores, settings = suite.make_case("causal", "most")
  with pytest.raises(ValueError, match=message):
    pallas_kernels.block_selection(scores, **{**settings, **changes})
