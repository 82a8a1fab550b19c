# SPDX-License-Identifier: Apache-2.0
"""Controlled means and their errors from accumulators; numpy float64, on host.

An estimate of pi(F) is mean(F) - sum_j cv_coef[j] mean(term_j). Coefficients
that are estimated are cross-fitted: chains (or, with one chain, alternate
batches) are split in two halves, and each half is controlled with the
coefficients of the other. That removes the bias of fitting and evaluating on
the same draws, and makes the reported error a held-out one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from unisparse_jax.mcmc import accumulators, checks

LEAST_SQUARES = "least_squares"
BATCH_MEANS = "batch_means"
BETWEEN_CHAINS = "between_chains"
METHODS = (LEAST_SQUARES, BATCH_MEANS, BETWEEN_CHAINS)
# Between-chain errors need this many chains to be known to about 18%.
MIN_CHAINS_FOR_MCSE = 16
_SINGULAR = 1e-12


class Estimate(NamedTuple):
  """Controlled and plain means of all test functions.

  Attributes:
    mean: controlled estimate.
    mcse: its Monte Carlo standard error.
    plain_mean: mean of F over all steps of all chains.
    plain_mcse: its error, computed the same way.
    variance: of F under the target.
    cv_coef: coefficients; the mean of both halves where cross-fitted.
    r_hat: potential scale reduction of F between chains; NaN with one chain.
    num_chains: chains.
    num_draws: steps of all chains together.
    chain_means: controlled means of each chain.
    plain_chain_means: means of F of each chain.
  """

  mean: Float[np.ndarray, " num_functions"]
  mcse: Float[np.ndarray, " num_functions"]
  plain_mean: Float[np.ndarray, " num_functions"]
  plain_mcse: Float[np.ndarray, " num_functions"]
  variance: Float[np.ndarray, " num_functions"]
  cv_coef: Float[np.ndarray, "num_terms num_functions"]
  r_hat: Float[np.ndarray, " num_functions"]
  num_chains: int
  num_draws: int
  chain_means: Float[np.ndarray, "num_chains num_functions"]
  plain_chain_means: Float[np.ndarray, "num_chains num_functions"]

  @property
  def factor(self) -> Float[np.ndarray, " num_functions"]:
    """Variance of the plain mean over that of the controlled one."""
    return _ratio(self.plain_mcse**2, self.mcse**2)

  @property
  def ess(self) -> Float[np.ndarray, " num_functions"]:
    """Exact independent draws worth as much as the controlled estimate.

    May exceed num_draws, as it should: it is not capped.
    """
    return _ratio(self.variance, self.mcse**2)

  @property
  def plain_ess(self) -> Float[np.ndarray, " num_functions"]:
    """Exact independent draws worth as much as the plain mean."""
    return _ratio(self.variance, self.plain_mcse**2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """One way to control a mean.

  Attributes:
    terms: numbers of the terms to use; none gives the plain mean.
    cv_coef: one of METHODS, or fixed coefficients, one for each of `terms`.
  """

  terms: tuple[int, ...]
  cv_coef: str | tuple[float, ...] = BATCH_MEANS


class Choice(NamedTuple):
  """Result of `choose`.

  Attributes:
    estimate: each function with its best candidate.
    chosen: name of that candidate for each function.
    variances: held-out variance of each candidate relative to the plain mean,
      by name.
  """

  estimate: Estimate
  chosen: list[str]
  variances: dict[str, Float[np.ndarray, " num_functions"]]


def estimate(
  accumulator: accumulators.Accumulator,
  cv_coef: str | Any = BATCH_MEANS,
  *,
  terms: Sequence[int] | None = None,
  cross_fit: bool = True,
  mcse: str | None = None,
) -> Estimate:
  """Controlled means from flushed accumulators.

  Args:
    accumulator: of one chain, or of many with a leading axis.
    cv_coef: how coefficients are found: "least_squares" over steps (regression
      with an intercept; ignores autocorrelation), "batch_means" or
      "between_chains" (both estimate what minimises the error of the mean
      itself); or the coefficients, [num_terms] or [num_terms, num_functions].
    terms: numbers of the terms to use; default all.
    cross_fit: whether estimated coefficients are of the other half.
    mcse: "between_chains" or "batch_means"; default the first from
      MIN_CHAINS_FOR_MCSE chains on.

  Returns:
    The estimate.

  Raises:
    ValueError: an argument is off, or too few chains or batches; the message
      names what would pass.
  """
  data = _Data.read(accumulator)
  terms = _check_terms(terms, data.num_terms)
  fixed = not isinstance(cv_coef, str)
  if fixed:
    coefs = [_check_fixed(cv_coef, len(terms), data.num_functions)]
    members = [np.ones(data.num_units, bool)]
  else:
    checks.check_choice("cv_coef", cv_coef, METHODS)
    members = data.halves() if cross_fit else [np.ones(data.num_units, bool)]
    fitted_on = [~m for m in members] if cross_fit else members
    coefs = [_fit(data, cv_coef, terms, m) for m in fitted_on]
  return _assemble(data, terms, coefs, members, _mcse_method(data, mcse))


def choose(
  accumulator: accumulators.Accumulator,
  candidates: Mapping[str, Candidate],
  *,
  mcse: str | None = None,
) -> Choice:
  """For each function the candidate of least held-out variance.

  The plain mean always competes. Variances are of batch means, whose
  coefficients come from the other half of the chains (or batches), so that a
  candidate that fits noise loses; switching control variates on can therefore
  cost no more than the noise of this comparison.

  Args:
    accumulator: as for `estimate`.
    candidates: by name; "plain" is added.
    mcse: as for `estimate`.

  Returns:
    The choice.
  """
  everyone = {**candidates, "plain": Candidate(terms=(), cv_coef=())}
  names = list(everyone)
  estimates = {
    name: estimate(accumulator, c.cv_coef, terms=c.terms, mcse=mcse)
    for name, c in everyone.items()
  }
  held_out = {
    name: estimate(accumulator, c.cv_coef, terms=c.terms, mcse=BATCH_MEANS).mcse
    for name, c in everyone.items()
  }
  best = np.argmin(np.stack([held_out[name] for name in names]), axis=0)
  plain = estimates["plain"]

  def pick(field):
    values = np.stack([getattr(estimates[name], field) for name in names])
    return np.take_along_axis(
      values, best.reshape(1, *[1] * (values.ndim - 2), -1), axis=0
    )[0]

  num_terms = _Data.read(accumulator).num_terms
  cv_coef = np.zeros((num_terms, len(best)))
  for number, name in enumerate(names):
    used, chosen = list(everyone[name].terms), best == number
    cv_coef[np.ix_(used, chosen)] = estimates[name].cv_coef[:, chosen]
  result = plain._replace(
    mean=pick("mean"),
    mcse=pick("mcse"),
    cv_coef=cv_coef,
    chain_means=pick("chain_means"),
  )
  variances = {
    name: _ratio(held_out[name] ** 2, held_out["plain"] ** 2) for name in names
  }
  return Choice(result, [names[i] for i in best], variances)


def split_shared(
  accumulator: accumulators.Accumulator, num_functions: int
) -> accumulators.Accumulator:
  """Gives every function the same terms, from one joint accumulator.

  Polynomial control variates serve all functions alike. Accumulate them with
  the functions as rows of one column: values [1] the first function, then the
  other functions and the terms as control_variates [.., 1]; this splits the
  result into the layout of `estimate`.

  Args:
    accumulator: leaves [..., rows, 1] and [..., rows, rows, 1].
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
    if products.shape[-1] == 1:
      raise ValueError(
        "accumulator must hold products of all rows; got products of the first "
        "alone; expected products_of_terms=True."
      )
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


class _Data(NamedTuple):
  """Accumulators as float64; a unit is a chain, or a fold of the one chain."""

  step_count: np.ndarray  # [chains]
  step_mean: np.ndarray  # [chains, rows, functions]
  step_products: np.ndarray  # [chains, kept, kept, functions]
  batch_count: np.ndarray  # [units]
  batch_mean: np.ndarray  # [units, rows, functions]
  batch_products: np.ndarray  # [units, rows, rows, functions]

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
    first = np.arange(self.num_units) % 2 == 0
    return [first, ~first]

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
      batches = _drop_axis(batches)
      count, mean = batches.count, batches.mean + batches.mean_low
      products = batches.products + batches.products_low
    else:
      count, mean, products = _merge_axis(batches, axis=1)
    return cls(
      steps.count,
      steps.mean + steps.mean_low,
      steps.products + steps.products_low,
      count,
      mean,
      products,
    )


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


def _merge_axis(moments, axis):
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


def _check_terms(terms, num_terms):
  if terms is None:
    return list(range(num_terms))
  terms = [int(t) for t in terms]
  checks.require(
    all(0 <= t < num_terms for t in terms) and len(set(terms)) == len(terms),
    "terms",
    "be different numbers of terms",
    terms,
    f"numbers in 0..{num_terms - 1}",
  )
  return terms


def _check_fixed(cv_coef, num_terms, num_functions):
  cv_coef = np.asarray(cv_coef, np.float64)
  if cv_coef.shape == (num_terms,):
    cv_coef = np.repeat(cv_coef[:, None], num_functions, axis=1)
  checks.require(
    cv_coef.shape == (num_terms, num_functions),
    "cv_coef",
    "have one number for each term, or [num_terms, num_functions]",
    cv_coef.shape,
    f"({num_terms},) or ({num_terms}, {num_functions})",
  )
  return cv_coef


def _mcse_method(data, mcse):
  if mcse is None:
    enough = data.num_chains >= MIN_CHAINS_FOR_MCSE
    return BETWEEN_CHAINS if enough else BATCH_MEANS
  checks.check_choice("mcse", mcse, (BETWEEN_CHAINS, BATCH_MEANS))
  checks.require(
    mcse == BATCH_MEANS or data.num_chains >= 2,
    "mcse",
    "be 'batch_means' with one chain",
    mcse,
  )
  return mcse


def _fit(data, method, terms, members):
  """Coefficients [terms, functions] from the units in `members`."""
  if not terms:
    return np.zeros((0, data.num_functions))
  rows = [0, *(t + 1 for t in terms)]
  if method == BETWEEN_CHAINS:
    num_members = int(members.sum())
    checks.require(
      data.num_chains > 1 and num_members >= len(terms) + 3,
      "cv_coef",
      "be another method with few chains",
      method,
      f"at least {2 * (len(terms) + 3)} chains for {len(terms)} terms; got "
      f"{data.num_chains}",
    )
    mean = data.step_mean[members][:, rows]
    mean = mean - mean.mean(0)
    products = np.einsum("cip,cjp->ijp", mean, mean)
  elif method == BATCH_MEANS:
    # Within units: offsets between chains are few and say little.
    products = data.batch_products[members][:, rows][:, :, rows].sum(0)
  else:
    checks.require(
      data.step_products.shape[1] == data.step_mean.shape[1],
      "cv_coef",
      "be 'batch_means' or 'between_chains' without products of terms",
      method,
      "products_of_terms=True in the accumulator",
    )
    if data.num_chains == 1:
      members = np.ones(1, bool)
    moments = accumulators.Moments(
      data.step_count[members],
      data.step_mean[members],
      np.zeros(()),
      data.step_products[members],
      np.zeros(()),
    )
    _, _, products = _merge_axis(moments, axis=0)
    products = products[rows][:, rows]
  return _solve(products[1:, 1:], products[1:, 0])


def _solve(normal, right):
  """Least-squares coefficients; directions without variance get none.

  Args:
    normal: [terms, terms, functions].
    right: [terms, functions].
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


def _assemble(data, terms, coefs, members, mcse_method):
  rows = [0, *(t + 1 for t in terms)]
  one_chain = data.num_chains == 1
  # Coefficients of each unit: [units, terms, functions].
  unit_coef = np.zeros((data.num_units, len(terms), data.num_functions))
  for coef, member in zip(coefs, members, strict=True):
    unit_coef[member] = coef
  weights = np.concatenate(
    [np.ones((data.num_units, 1, data.num_functions)), -unit_coef], axis=1
  )
  unit_mean = data.batch_mean if one_chain else data.step_mean
  unit_means = (weights * unit_mean[:, rows]).sum(1)  # [units, functions]
  share = data.batch_count / data.batch_count.sum()
  mean = unit_means[0] + (share[:, None] * (unit_means - unit_means[0])).sum(0)
  plain_unit_means = unit_mean[:, 0]
  plain_mean = plain_unit_means[0] + (
    share[:, None] * (plain_unit_means - plain_unit_means[0])
  ).sum(0)

  def batch_error(weights, rows):
    products = data.batch_products[:, rows][:, :, rows]
    spread = np.einsum("uip,uijp,ujp->p", weights, products, weights)
    total = data.batch_count.sum()
    freedom = total - data.num_units
    return np.sqrt(np.maximum(spread, 0) / freedom / total)

  if mcse_method == BATCH_MEANS:
    mcse = batch_error(weights, rows)
    plain_mcse = batch_error(weights[:, :1], [0])
  else:
    root = np.sqrt(data.num_chains)
    mcse = unit_means.std(0, ddof=1) / root
    plain_mcse = plain_unit_means.std(0, ddof=1) / root
  num_draws = data.step_count.sum()
  variance, r_hat = _spread(data)
  return Estimate(
    mean=mean,
    mcse=mcse,
    plain_mean=plain_mean,
    plain_mcse=plain_mcse,
    variance=variance,
    cv_coef=np.mean(coefs, axis=0),
    r_hat=r_hat,
    num_chains=data.num_chains,
    num_draws=int(num_draws),
    chain_means=mean[None] if one_chain else unit_means,
    plain_chain_means=plain_mean[None] if one_chain else plain_unit_means,
  )


def _spread(data):
  """Variance of F under the target, and R-hat."""
  count = data.step_count[:, None]
  within = data.step_products[:, 0, 0] / (count - 1)
  if data.num_chains == 1:
    return within[0], np.full(data.num_functions, np.nan)
  within = within.mean(0)
  between = data.step_mean[:, 0].var(0, ddof=1)
  length = count.mean()
  total = within * (length - 1) / length + between
  return total, np.sqrt(_ratio(total, within))


def _ratio(a, b):
  """a / b, infinite where only b vanishes and 1 where both do."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  safe = np.where(b > 0, b, 1)
  return np.where(b > 0, a / safe, np.where(a > 0, np.inf, 1.0))
