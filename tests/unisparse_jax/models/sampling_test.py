# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from unisparse_jax import models

LOGITS = jnp.log(jnp.asarray([0.4, 0.05, 0.3, 0.15, 0.1]))
DRAWS = 20_000
SAMPLERS = [
  (models.Temperature(), [0.4, 0.05, 0.3, 0.15, 0.1]),
  (
    models.Temperature(temperature=0.5),
    np.square([0.4, 0.05, 0.3, 0.15, 0.1]) / 0.285,
  ),
  (models.TopK(top_k=1), [1, 0, 0, 0, 0]),
  (models.TopK(top_k=3), np.asarray([0.4, 0, 0.3, 0.15, 0]) / 0.85),
  (models.TopK(top_k=9), [0.4, 0.05, 0.3, 0.15, 0.1]),
  (
    models.TopK(top_k=2, temperature=0.5),
    np.asarray([0.16, 0, 0.09, 0, 0]) / 0.25,
  ),
  (models.TopP(top_p=0.01), [1, 0, 0, 0, 0]),
  (models.TopP(top_p=0.5), np.asarray([0.4, 0, 0.3, 0, 0]) / 0.7),
  (models.TopP(top_p=0.8), np.asarray([0.4, 0, 0.3, 0.15, 0]) / 0.85),
  (models.TopP(top_p=1.0), [0.4, 0.05, 0.3, 0.15, 0.1]),
  # Squared, 0.16 of 0.285 already reaches the half.
  (models.TopP(top_p=0.5, temperature=0.5), [1, 0, 0, 0, 0]),
]


def p_value(tokens, expected):
  """Of the chi-square test; 0 if a token of probability 0 was drawn."""
  counts = np.bincount(np.asarray(tokens).ravel(), minlength=len(expected))
  expected = np.asarray(expected, np.float64)
  possible = expected > 0
  if counts[~possible].any():
    return 0.0
  if possible.sum() == 1:
    return 1.0
  return stats.chisquare(
    counts[possible], counts.sum() * expected[possible]
  ).pvalue


def draw(sampler, seed=0):
  logits = jnp.broadcast_to(LOGITS[None], (DRAWS, 5))
  return sampler(logits, jax.random.key(seed))


@pytest.mark.parametrize("sampler, expected", SAMPLERS, ids=str)
def test_draws_follow_the_distribution(sampler, expected):
  tokens = draw(sampler)
  assert tokens.shape == (DRAWS,) and tokens.dtype == jnp.int32
  assert p_value(tokens, expected) > 1e-3
  np.testing.assert_allclose(
    sampler.probabilities(LOGITS), expected, rtol=1e-5, atol=1e-7
  )


def test_chi_square_sees_a_wrong_distribution():
  tokens = draw(models.Temperature(temperature=1.05))
  assert p_value(tokens, [0.4, 0.05, 0.3, 0.15, 0.1]) < 1e-4
  assert p_value(draw(models.Temperature()), [0.7, 0, 0.3, 0, 0]) == 0.0


def test_draws_depend_on_the_key():
  sampler = models.Temperature()
  np.testing.assert_array_equal(draw(sampler, 1), draw(sampler, 1))
  assert np.mean(np.asarray(draw(sampler, 1) != draw(sampler, 2))) > 0.5


def test_greedy_takes_the_first_of_a_tie():
  logits = jnp.asarray([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])
  greedy = models.Greedy()
  np.testing.assert_array_equal(greedy(logits), [1, 0])
  np.testing.assert_array_equal(
    greedy.probabilities(logits), [[0, 1, 0], [1, 0, 0]]
  )


def test_ties_keep_exactly_top_k():
  probabilities = models.TopK(top_k=2).probabilities(jnp.zeros((4,)))
  np.testing.assert_allclose(probabilities, [0.5, 0.5, 0.0, 0.0])


def test_rows_are_drawn_apart():
  logits = jnp.asarray([[0.0, 9e9, 0.0], [9e9, 0.0, 0.0]])
  for sampler in (models.TopP(top_p=0.9), models.TopK(top_k=2)):
    tokens = sampler(logits, jax.random.key(0))
    np.testing.assert_array_equal(tokens, [1, 0])


@pytest.mark.parametrize(
  "name, make",
  [
    ("temperature", lambda: models.Temperature(temperature=0.0)),
    ("temperature", lambda: models.TopP(top_p=0.5, temperature=math.nan)),
    ("top_k", lambda: models.TopK(top_k=0)),
    ("top_k", lambda: models.TopK(top_k=2.0)),
    ("top_p", lambda: models.TopP(top_p=0.0)),
    ("top_p", lambda: models.TopP(top_p=1.1)),
    ("top_p", lambda: models.TopP(top_p=math.nan)),
  ],
)
def test_bad_setting_is_named(name, make):
  with pytest.raises(ValueError, match=f"^{name} must .*{name}="):
    make()
