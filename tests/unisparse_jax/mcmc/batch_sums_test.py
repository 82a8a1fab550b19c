# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import (
  accumulators,
  control_variates,
  estimates,
  poisson,
  preconditioner,
)


class Info(NamedTuple):
  position_prev: Any
  proposal: Any
  acceptance_rate: Any
  proposal_mean: Any
  precond_grad: Any
  variance: Any


DIM, STEPS, BATCH = 4, 12, 4


def infos(seed=0):
  rng = np.random.default_rng(seed)
  vectors = rng.standard_normal((5, STEPS, DIM)) + 3
  x, y, mean, grad, variance = map(jnp.asarray, vectors)
  alpha = jnp.asarray(rng.uniform(size=STEPS))
  return Info(x, y, alpha, mean, grad, variance**2)


def covariance_of(info, reference):
  return preconditioner.Scaled(
    preconditioner.Diagonal(info.variance), reference.noise_scale
  )


def stream(variates, info, reference, **options):
  """Steps through the collector, batch by batch, as the loop does it."""
  start = variates.init(info.position_prev[:1] - 0.5, **options)
  carry = jax.tree.map(lambda x: x[0], start)
  collector = variates.collector
  for first in range(0, STEPS, BATCH):
    batch = collector.open(carry, BATCH, reference)
    for number in range(first, first + BATCH):
      one = jax.tree.map(lambda x, n=number: x[n], info)
      batch = collector.update(batch, None, one, reference)
    carry = collector.flush(batch)
  return carry


# Families in any order, sharing coordinates or not, and one with a series.
FAMILIES = {
  "both": (poisson.Linear(), poisson.Square()),
  "square_first": (
    poisson.Square((2, 0)),
    poisson.Linear((2, 0)),
    poisson.Square(),
  ),
  "with_others": (
    poisson.Linear((1,)),
    poisson.Product(((0, 1),)),
    poisson.exponential(np.full((1, DIM), 0.1), num_terms=1),
    poisson.Square((1,)),
    poisson.Linear((3, 1)),
  ),
}


@pytest.mark.parametrize("score", [True, False])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_sums_give_the_rows_of_every_step(name, score, x64):
  info = infos()
  mean = jnp.array([3.0, 1.0, 2.0, 4.0])
  a = preconditioner.diagonal(np.array([1.0, 2.0, 0.5, 1.5]))
  reference = poisson.Reference(jnp.float64(0.7), mean, a)
  variates = control_variates.poisson_terms(
    FAMILIES[name], score=score, covariance_fn=covariance_of
  )
  stored = jax.vmap(lambda i: variates.term_fn(i, reference))(info)
  rows = np.concatenate(
    [stored.values[:, None], stored.control_variates], axis=1
  )
  assert rows.shape[1] == (4 if score else 3)
  lean = stream(variates, info, reference)
  assert lean.steps.products.shape[0] == 1
  np.testing.assert_allclose(lean.steps.mean, rows.mean(0), rtol=1e-12)
  gap = rows - rows.mean(0)
  products = np.einsum("sif,sjf->ijf", gap, gap)
  np.testing.assert_allclose(
    lean.steps.products[0, 0], products[0, 0], rtol=1e-11
  )
  full = stream(variates, info, reference, products_of_terms=True)
  np.testing.assert_allclose(full.steps.products, products, rtol=1e-10)
  for x, y in zip(full.batches, lean.batches, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def test_a_proposal_that_overflowed_leaves_its_row_finite(x64):
  info = infos()
  info = info._replace(
    proposal=info.proposal.at[0].set(jnp.inf),
    proposal_mean=info.proposal_mean.at[0].set(jnp.inf),
    acceptance_rate=info.acceptance_rate.at[0].set(0.0),
  )
  a = preconditioner.identity(DIM)
  reference = poisson.Reference(jnp.float64(0.7), jnp.zeros(DIM), a)
  variates = control_variates.poisson_terms(FAMILIES["both"])
  carry = stream(variates, info, reference)
  assert np.all(np.isfinite(carry.steps.mean[1]))


def test_one_fold_serves_several_chains_only(x64):
  variates = control_variates.poisson_terms(poisson.Linear())
  a = preconditioner.identity(DIM)
  reference = poisson.Reference(jnp.float64(0.7), jnp.zeros(DIM), a)
  for num_chains, num_folds in ((1, 2), (3, 1)):
    made = variates.init(jnp.zeros((num_chains, DIM)))
    assert made.batches.count.shape == (num_chains, num_folds)
  alone = stream(variates, infos(), reference, num_folds=1)
  with pytest.raises(
    ValueError, match=r"accumulator must have its batches in 2"
  ):
    estimates.estimate(alone)
  with pytest.raises(ValueError, match=r"num_folds must be an integer >= 1"):
    accumulators.init(jnp.zeros(2), 1, num_folds=0)
