"""The suite of composite_scores on every back end that a CPU can run."""

import functools

import pytest

from pallas_kernels.composite_scores import api, mosaic_tpu, triton
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


class TestMosaicTpuInterpreted(suite.BriefSuite):
  implementation = "mosaic_tpu"

  @pytest.fixture(autouse=True)
  def interpret(self, monkeypatch):
    interpreted = functools.partial(mosaic_tpu.composite_scores, interpret=True)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_tpu", interpreted)

  def test_long_matches_float64(self):
    arrays, settings = suite.make_long_case("square")
    with pytest.raises(NotImplementedError, match="one float32 vector"):
      self.run(arrays, settings)

  test_long_in_bfloat16_and_the_largest = None
  test_long_of_equal_scores = None


@pytest.mark.gpu
class TestTriton(suite.CompositeScoresSuite):
  implementation = "triton"
  tolerance = 2e-3  # TensorFloat-32
