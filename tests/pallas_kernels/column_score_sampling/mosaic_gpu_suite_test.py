# SPDX-License-Identifier: Apache-2.0
"""The common suite on the Hopper kernels, through the dispatcher.

Lowered on any machine, run on a card, at sizes that the back end takes: two
tiles of rows for each multiprocessor. Not interpreted: under jit, on two cores,
JAX 0.12's interpreter of Mosaic GPU kernels was seen to hang.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import device
from tests.pallas_kernels.column_score_sampling import suite


def rows(count, kv_len):
  """Rising positions, the last of them that of the last key."""
  return np.arange(1, count + 1) * kv_len // count - 1


def any_order(count, kv_len):
  """Positions in no order, -1 among them."""
  return np.random.default_rng(2).integers(-1, kv_len, count)


# As `suite.CASES`, by the names that the suite's tests ask for.
CARD_CASES = {
  "strided": (1, 400, 32, 8, 128, rows(2053, 400), True, None),
  "ragged": (2, 333, 32, 4, 64, rows(1100, 333), True, (333, 90)),
  "any_order": (1, 200, 32, 2, 64, any_order(2053, 200), True, None),
  "many_keys": (1, 1000, 32, 8, 128, rows(2053, 1000), True, 900),
  "bidirectional": (1, 300, 32, 8, 128, range(2053), False, 170),
}


def take_cases(monkeypatch, cases):
  """Runs the suite's tests with others' sizes, in bfloat16 where not named."""
  make_case = suite.make_case

  def low_precision(name, dtype=jnp.bfloat16):
    return make_case(name, dtype)

  monkeypatch.setattr(suite, "CASES", cases)
  monkeypatch.setattr(suite, "make_case", low_precision)


@pytest.mark.parametrize("name", CARD_CASES)
def test_cases_of_the_card_lower_for_cuda(name, monkeypatch):
  take_cases(monkeypatch, CARD_CASES)
  monkeypatch.setattr(device, "is_hopper", lambda: True)
  (q, k, positions), settings = suite.make_case(name)
  op = functools.partial(
    pallas_kernels.column_score_sampling,
    **settings,
    implementation="mosaic_gpu",
  )
  traced = jax.jit(op).trace(q, k, positions)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu") == 2


@pytest.mark.gpu
class TestOnTheCard(suite.ColumnScoreSamplingSuite):
  implementation = "mosaic_gpu"

  @pytest.fixture(autouse=True)
  def sizes_of_the_card(self, monkeypatch):
    take_cases(monkeypatch, CARD_CASES)

  @pytest.mark.parametrize("name", CARD_CASES)
  @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
  def test_matches_float64(self, name, dtype):
    super().test_matches_float64(name, dtype)

  def test_few_rows_are_refused(self):
    (q, k, positions), settings = suite.make_case("strided")
    with pytest.raises(NotImplementedError, match=r"tiles of rows.*triton"):
      self.run((q[:, :50], k, positions[:, :50]), settings)
