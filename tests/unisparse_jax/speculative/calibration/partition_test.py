# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from unisparse_jax.speculative import calibration


def test_finds_the_steps_of_a_staircase():
  entropy = np.linspace(0.0, 16.0, 1601)
  rank = np.floor(entropy / 2.0).clip(max=7)
  for criterion in ("weighted", "printed"):
    thresholds = calibration.fit_thresholds(entropy, rank, criterion=criterion)
    if criterion == "weighted":
      np.testing.assert_allclose(thresholds, np.arange(2, 16, 2), atol=0.02)
    assert np.all(np.diff(thresholds[np.isfinite(thresholds)]) > 0)
  bins = calibration.bin_of(np.array([0.0, 2.5, 15.9]), np.arange(2, 16, 2))
  np.testing.assert_array_equal(bins, [0, 1, 7])


def test_the_printed_criterion_is_another_one():
  rng = np.random.default_rng(0)
  entropy = rng.gamma(2.0, 2.0, 800)
  rank = entropy * 3 + rng.normal(0, 4, 800)
  weighted, printed = (
    calibration.fit_thresholds(entropy, rank, criterion=name)
    for name in ("weighted", "printed")
  )
  assert not np.allclose(weighted, printed)


def test_a_leaf_holds_its_share():
  rng = np.random.default_rng(1)
  entropy = rng.gamma(2.0, 2.0, 1000)
  for criterion in ("weighted", "printed"):
    thresholds = calibration.fit_thresholds(
      entropy, rng.normal(size=1000), min_leaf=0.05, criterion=criterion
    )
    counts = np.bincount(calibration.bin_of(entropy, thresholds), minlength=8)
    assert counts[counts > 0].min() >= 49  # float32 edges may move one


def test_too_few_bins_end_in_infinity():
  thresholds = calibration.fit_thresholds(
    np.array([0.0] * 50 + [3.0] * 50), np.array([0.0] * 50 + [9.0] * 50)
  )
  assert thresholds[0] == pytest.approx(1.0, abs=0.01)  # halfway in log1p
  assert np.all(np.isinf(thresholds[1:]))
  alone = calibration.fit_thresholds(np.zeros(20), np.arange(20.0))
  assert np.all(np.isinf(alone))


@pytest.mark.parametrize(
  ("entropy", "criterion", "message"),
  [
    ([], "weighted", "not empty"),
    ([-1.0], "weighted", "entropy must be finite"),
    ([np.nan], "weighted", "entropy must be finite"),
    ([1.0], "gini", "criterion must be one of"),
  ],
)
def test_names_what_is_wrong(entropy, criterion, message):
  with pytest.raises(ValueError, match=message):
    calibration.fit_thresholds(
      np.array(entropy), np.array(entropy), criterion=criterion
    )
