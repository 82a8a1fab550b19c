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
from scipy import stats

from unisparse_jax.mcmc import accumulators, chain_data, checks

LEAST_SQUARES = "least_squares"
BATCH_MEANS = "batch_means"
BETWEEN_CHAINS = "between_chains"
METHODS = (LEAST_SQUARES, BATCH_MEANS, BETWEEN_CHAINS)
# Between-chain errors need this many chains to be known to about 18%.
MIN_CHAINS_FOR_MCSE = 16


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
    degrees: of freedom of both errors.
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
  degrees: int
  chain_means: Float[np.ndarray, "num_chains num_functions"]
  plain_chain_means: Float[np.ndarray, "num_chains num_functions"]

  def interval(
    self, level: float = 0.95
  ) -> tuple[Float[np.ndarray, " num_functions"], ...]:
    """Lower and upper ends of intervals that hold pi(F) at this rate.

    Student-t intervals with `degrees` of freedom.

    Args:
      level: in (0, 1).
    """
    checks.check_open_interval("level", level, 0, 1)
    width = stats.t(self.degrees).ppf(0.5 + level / 2) * self.mcse
    return self.mean - width, self.mean + width

  @property
  def factor(self) -> Float[np.ndarray, " num_functions"]:
    """Variance of the plain mean over that of the controlled one."""
    return chain_data.ratio(self.plain_mcse**2, self.mcse**2)

  @property
  def ess(self) -> Float[np.ndarray, " num_functions"]:
    """Exact independent draws worth as much as the controlled estimate.

    May exceed num_draws, as it should: it is not capped. NaN where F never
    varied.
    """
    return self._ess(self.mcse)

  @property
  def plain_ess(self) -> Float[np.ndarray, " num_functions"]:
    """Exact independent draws worth as much as the plain mean."""
    return self._ess(self.plain_mcse)

  def _ess(self, mcse):
    found = chain_data.ratio(self.variance, mcse**2)
    return np.where(self.variance == 0, np.nan, found)


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
    estimate: each function with its best candidate; its `cv_coef` is NaN where
      that is one of `others`.
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
  data = chain_data.ChainData.read(accumulator)
  return _estimate(data, cv_coef, terms, cross_fit=cross_fit, mcse=mcse)


def _estimate(data, cv_coef, terms, *, cross_fit=True, mcse=None):
  terms = _check_terms(terms, data.num_terms)
  fixed = not isinstance(cv_coef, str)
  if fixed:
    coefs = [_check_fixed(cv_coef, len(terms), data.num_functions)] * 2
  else:
    checks.check_choice("cv_coef", cv_coef, METHODS)
    if cross_fit:
      coefs = [_fit(data, cv_coef, terms, (half,)) for half in (1, 0)]
    else:
      coefs = [_fit(data, cv_coef, terms, (0, 1))] * 2
  return _assemble(data, terms, coefs, _mcse_method(data, mcse))


def choose(
  accumulator: accumulators.Accumulator,
  candidates: Mapping[str, Candidate],
  *,
  others: Mapping[str, accumulators.Accumulator] | None = None,
  mcse: str | None = None,
) -> Choice:
  """For each function the candidate of least held-out variance.

  The plain mean always competes. Variances are held out: coefficients come from
  the other half of the chains (or batches), so that a candidate that fits noise
  loses. Of the variance of batch means and that of chain means the larger
  counts: chains that have not mixed hide theirs from the first. (With batch
  means alone, the score was chosen on a posterior of 53 coefficients with R-hat
  1.13, at 40 times the variance of the plain mean.)

  Args:
    accumulator: as for `estimate`.
    candidates: by name; "plain" is added.
    others: accumulators of the same steps and functions with other terms, such
      as polynomial ones through `split_shared`; all terms of each are used.
    mcse: as for `estimate`.

  Returns:
    The choice.
  """
  data = chain_data.ChainData.read(accumulator)
  more_data = {
    name: chain_data.ChainData.read(a) for name, a in (others or {}).items()
  }
  plain_candidate = Candidate(terms=(), cv_coef=())
  everyone = {**candidates, "plain": plain_candidate}

  def all_of(mcse):
    found = {
      name: _estimate(data, c.cv_coef, c.terms, mcse=mcse)
      for name, c in everyone.items()
    }
    more = {
      name: _estimate(d, BATCH_MEANS, None, mcse=mcse)
      for name, d in more_data.items()
    }
    return {**found, **more}

  estimates = all_of(mcse)
  names, plain = list(estimates), estimates["plain"]
  held_out = {name: e.mcse**2 for name, e in all_of(BATCH_MEANS).items()}
  if plain.num_chains >= MIN_CHAINS_FOR_MCSE:
    between = all_of(BETWEEN_CHAINS)
    held_out = {
      name: np.maximum(v, between[name].mcse ** 2)
      for name, v in held_out.items()
    }
  best = np.argmin(np.stack([held_out[name] for name in names]), axis=0)

  def pick(field):
    values = np.stack([getattr(estimates[name], field) for name in names])
    return np.take_along_axis(
      values, best.reshape(1, *[1] * (values.ndim - 2), -1), axis=0
    )[0]

  num_terms = np.shape(accumulator.centre)[-2] - 1
  cv_coef = np.zeros((num_terms, len(best)))
  for number, name in enumerate(names):
    chosen = best == number
    if name in everyone:
      used = list(everyone[name].terms)
      cv_coef[np.ix_(used, chosen)] = estimates[name].cv_coef[:, chosen]
    else:
      cv_coef[:, chosen] = np.nan
  result = plain._replace(
    mean=pick("mean"),
    mcse=pick("mcse"),
    cv_coef=cv_coef,
    chain_means=pick("chain_means"),
  )
  variances = {
    name: chain_data.ratio(held_out[name], held_out["plain"]) for name in names
  }
  return Choice(result, [names[i] for i in best], variances)


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


def _fit(data, method, terms, halves):
  """Coefficients [terms, functions] from the units of one half or both."""
  if not terms:
    return np.zeros((0, data.num_functions))
  rows = [0, *(t + 1 for t in terms)]
  masks = data.halves()
  members = np.any([masks[half] for half in halves], axis=0)
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
    products = data.half_products[list(halves)].sum(0)[rows][:, rows]
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
    _, _, products = chain_data.merge_axis(moments, axis=0)
    products = products[rows][:, rows]
  return chain_data.least_squares(products[1:, 1:], products[1:, 0])


def _assemble(data, terms, coefs, mcse_method):
  """The estimate, each half of the units with its own coefficients."""
  rows = [0, *(t + 1 for t in terms)]
  one_chain = data.num_chains == 1
  # Coefficients of each unit: [units, terms, functions].
  unit_coef = np.zeros((data.num_units, len(terms), data.num_functions))
  for coef, member in zip(coefs, data.halves(), strict=True):
    unit_coef[member] = coef
  unit_mean = data.batch_mean if one_chain else data.step_mean
  # [units, functions]
  unit_means = unit_mean[:, 0] - (unit_coef * unit_mean[:, rows[1:]]).sum(1)
  share = data.batch_count / data.batch_count.sum()
  mean = unit_means[0] + (share[:, None] * (unit_means - unit_means[0])).sum(0)
  plain_unit_means = unit_mean[:, 0]
  plain_mean = plain_unit_means[0] + (
    share[:, None] * (plain_unit_means - plain_unit_means[0])
  ).sum(0)

  def batch_error(coefs, rows):
    spread = np.zeros(data.num_functions)
    for coef, products in zip(coefs, data.half_products, strict=True):
      weights = np.concatenate([np.ones((1, data.num_functions)), -coef])
      products = products[rows][:, rows]
      spread += np.einsum("ip,ijp,jp->p", weights, products, weights)
    total = data.batch_count.sum()
    freedom = total - data.num_units
    return np.sqrt(np.maximum(spread, 0) / freedom / total)

  if mcse_method == BATCH_MEANS:
    mcse = batch_error(coefs, rows)
    plain_mcse = batch_error([coef[:0] for coef in coefs], [0])
    degrees = data.batch_count.sum() - data.num_units
  else:
    root = np.sqrt(data.num_chains)
    mcse = unit_means.std(0, ddof=1) / root
    plain_mcse = plain_unit_means.std(0, ddof=1) / root
    degrees = data.num_chains - 1
  num_draws = data.step_count.sum()
  variance, r_hat = chain_data.spread(data)
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
    degrees=int(degrees),
    chain_means=mean[None] if one_chain else unit_means,
    plain_chain_means=plain_mean[None] if one_chain else plain_unit_means,
  )
