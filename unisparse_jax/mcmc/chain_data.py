# SPDX-License-Identifier: Apache-2.0
"""Accumulators as numpy float64, in the layout that estimates are made from."""

from typing import NamedTuple

import numpy as np

from unisparse_jax.mcmc import accumulators, checks

_SINGULAR = 1e-12


class ChainData(NamedTuple):
  """Accumulators as float64; a unit is a chain, or a fold of the one chain."""

  step_count: np.ndarray  # [chains]
  step_mean: np.ndarray  # [chains, rows, functions]
  step_products: np.ndarray  # [chains, kept, kept, functions]
  batch_count: np.ndarray  # [units]
  batch_mean: np.ndarray  # [units, rows, functions]
  # Within units, summed over each half of them: thousands of chains have
  # gigabytes of products, read once.
  half_products: np.ndarray  # [2, rows, rows, functions]

  @property
  def num_terms(self):
    return self.step_mean.shape[1] - 1

  @property
  def num_functions(self):
    return self.step_mean.shape[2]

  @property
  def num_chains(self):
    return self.step_mean.shape[0]

  @property
  def num_units(self):
    return self.batch_mean.shape[0]

  def halves(self):
    """Masks of the two halves of the units."""
    return _halves(self.num_units)

  @classmethod
  def read(cls, accumulator):
    accumulator = accumulators.Accumulator(*map(_as_float64, accumulator))
    if accumulator.num_batches.ndim == 0:
      accumulator = accumulators.Accumulator(
        *(_add_axis(x) for x in accumulator)
      )
    steps, batches = accumulator.steps, accumulator.batches
    checks.require(
      bool(np.all(accumulator.batch_count == 0)),
      "accumulator",
      "be flushed",
      "one with an unfinished batch",
    )
    checks.require(
      bool(np.all(accumulator.num_batches >= 2)),
      "accumulator",
      "hold at least 2 batches of every chain",
      int(np.min(accumulator.num_batches)),
    )
    if steps.count.shape[0] == 1:
      checks.require(
        batches.count.shape[1] == 2,
        "accumulator",
        "have its batches in 2 folds for an estimate from one chain",
        f"num_folds={batches.count.shape[1]}",
        "num_folds=2 where it was made",
      )
      batches = _drop_axis(batches)
      count, mean = batches.count, batches.mean + batches.mean_low
      products = batches.products + batches.products_low
    else:
      count, mean, products = merge_axis(batches, axis=1)
    return cls(
      steps.count,
      steps.mean + steps.mean_low,
      steps.products + steps.products_low,
      count,
      mean,
      np.stack([products[half].sum(0) for half in _halves(len(count))]),
    )


def _halves(num_units):
  first = np.arange(num_units) % 2 == 0
  return [first, ~first]


def split_shared(
  accumulator: accumulators.Accumulator, num_functions: int
) -> accumulators.Accumulator:
  """Gives every function the same terms, from one joint accumulator.

  Polynomial control variates serve all functions alike. Accumulate them with
  the functions as rows of one column: values [1] the first function, then the
  other functions and the terms as control_variates [.., 1]; this splits the
  result into the layout of `estimate`.

  Args:
    accumulator: leaves [..., rows, 1] and [..., rows, rows, 1]. Without
      products_of_terms the estimate's `variance` and `r_hat` are NaN.
    num_functions: how many of the rows are functions.

  Returns:
    Numpy leaves; rows are a function and all terms.
  """

  def rows_of(mean):  # [..., rows, 1] -> [..., 1 + terms, functions]
    mean = np.asarray(mean)[..., 0]
    values = mean[..., None, :num_functions]
    shared = mean[..., num_functions:, None]
    shared = np.broadcast_to(shared, (*shared.shape[:-1], num_functions))
    return np.concatenate([values, shared], axis=-2)

  def products_of(products):
    products = np.asarray(products)[..., 0]
    if products.shape[-1] == 1 and num_functions > 1:
      # Of the first function alone: the variances of the others are unknown.
      return np.full((*products.shape[:-2], 1, 1, num_functions), np.nan)
    f, rows = num_functions, products.shape[-1]
    out = np.empty((*products.shape[:-2], 1 + rows - f, 1 + rows - f, f))
    out[..., 1:, 1:, :] = products[..., f:, f:, None]
    out[..., 0, 1:, :] = products[..., f:, :f]
    out[..., 1:, 0, :] = products[..., f:, :f]
    out[..., 0, 0, :] = np.diagonal(products[..., :f, :f], axis1=-2, axis2=-1)
    return out

  def moments_of(moments):
    return accumulators.Moments(
      np.asarray(moments.count),
      rows_of(moments.mean),
      rows_of(moments.mean_low),
      products_of(moments.products),
      products_of(moments.products_low),
    )

  return accumulator._replace(
    centre=rows_of(accumulator.centre),
    batch_sum=rows_of(accumulator.batch_sum),
    batch_products=products_of(accumulator.batch_products),
    steps=moments_of(accumulator.steps),
    batches=moments_of(accumulator.batches),
  )


def least_squares(normal: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Least-squares coefficients; directions without variance get none.

  Args:
    normal: [terms, terms, functions].
    right: [terms, functions].

  Returns:
    [terms, functions].
  """
  normal = np.moveaxis(normal, -1, 0)  # [functions, terms, terms]
  scale = np.sqrt(np.einsum("pii->pi", normal))
  inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0)
  correlation = normal * inverse[:, :, None] * inverse[:, None, :]
  value, vector = np.linalg.eigh(correlation)
  kept = value > _SINGULAR * np.maximum(value[:, -1:], 1e-300)
  weight = np.where(kept, 1 / np.where(kept, value, 1), 0)
  scaled = right.T * inverse  # [functions, terms]
  inside = np.einsum("pij,pi->pj", vector, scaled) * weight
  return (np.einsum("pij,pj->pi", vector, inside) * inverse).T


def _as_float64(x):
  if isinstance(x, accumulators.Moments):
    return accumulators.Moments(*map(_as_float64, x))
  return np.asarray(x, np.float64)


def _add_axis(x):
  if isinstance(x, accumulators.Moments):
    return accumulators.Moments(*map(_add_axis, x))
  return x[None]


def _drop_axis(moments):
  return accumulators.Moments(*(x[0] for x in moments))


def merge_axis(
  moments: accumulators.Moments, axis: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(count, mean, products) over one axis, such as that of the folds."""
  weight = np.moveaxis(moments.count, axis, 0)
  mean = np.moveaxis(moments.mean + moments.mean_low, axis, 0)
  products = np.moveaxis(moments.products + moments.products_low, axis, 0)
  count = weight.sum(0)
  share = (weight / count)[..., None, None]
  # About the first mean, so that equal means lose no digits.
  centre = mean[0]
  total_mean = centre + (share * (mean - centre)).sum(0)
  gap = mean - total_mean
  outer = gap[..., :, None, :] * gap[..., None, :, :]
  total = (products + weight[..., None, None, None] * outer).sum(0)
  return count, total_mean, total


def spread(data):
  """Variance of F under the target, and R-hat."""
  count = data.step_count[:, None]
  within = data.step_products[:, 0, 0] / (count - 1)
  if data.num_chains == 1:
    return within[0], np.full(data.num_functions, np.nan)
  within = within.mean(0)
  between = data.step_mean[:, 0].var(0, ddof=1)
  length = count.mean()
  total = within * (length - 1) / length + between
  return total, np.sqrt(ratio(total, within))


def ratio(a, b):
  """a / b, infinite where only b vanishes and 1 where both do."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  safe = np.where(b > 0, b, 1)
  return np.where(b > 0, a / safe, np.where(a > 0, np.inf, 1.0))
