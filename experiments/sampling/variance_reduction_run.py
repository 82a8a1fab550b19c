# SPDX-License-Identifier: Apache-2.0
"""One posterior at one acceptance rate: factors of all control variates."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from experiments.sampling import mcmc_problems
from unisparse_jax import mcmc

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One posterior at one acceptance rate.

  Attributes:
    target: see `mcmc_problems.make`.
    acceptance: warm-up's target; step_size is then frozen.
    num_chains: repeats of the estimate.
    lengths: steps of each chain at which the estimates are taken, ascending.
    warm_up: steps of the last window.
    windows: steps of windows before it, each followed by a preconditioner from
      the chains, on logistic posteriors; none keeps the Laplace covariance.
    approach: acceptance of as many steps before; their smaller moves bring
      chains out of places from which larger ones are not accepted.
    batch_size: steps of a batch mean; lengths are multiples of it.
    squares: whether second moments are functions beside the means.
    polynomial: order of the zero-variance baseline beside ours; 0 for none.
    calibrate: whether every chain alone also gives intervals, and how often
      they hold the mean of all chains.
  """

  target: str
  acceptance: float = 0.77
  num_chains: int = 100
  lengths: tuple[int, ...] = (1000, 10_000)
  warm_up: int = 1000
  windows: tuple[int, ...] = ()
  approach: float | None = None
  batch_size: int = 50
  squares: bool = True
  polynomial: int = 1
  calibrate: bool = False


def measure(row: Row, *, seed: int, dtype: Any):
  """Yields one measurement for each length."""
  problem = mcmc_problems.make(row.target, dtype)
  linear = mcmc.poisson.Linear(problem.coordinates)
  functions = (linear,)
  if row.squares:
    functions += (mcmc.poisson.Square(problem.coordinates),)
  variates = mcmc.control_variates.poisson_terms(functions, **problem.hooks)
  keys = jax.random.split(jax.random.key(seed), 2)
  state = jax.vmap(problem.init)(problem.start(keys[0], row.num_chains))
  warm, problem = warm_up(row, problem, keys[1], state)
  positions = warm.state.position
  # Least squares are among the methods, and single chains are calibrated.
  collector = variates.collector
  carry = variates.init(positions, products_of_terms=True, num_folds=2)
  if row.polynomial:
    baseline = mcmc.control_variates.polynomial_terms(
      functions, problem.target.dim, order=row.polynomial
    )
    collector = both(collector, baseline.collector)
    carry = (carry, baseline.init(positions, products_of_terms=False))
  run = mcmc.base.Run(warm.state, warm.rng_keys, None, carry, None)
  steps = 0
  reference = problem.reference(warm.step_size)
  num_linear = len(problem.coordinates or range(problem.target.dim))
  for length in row.lengths:
    start = time.perf_counter()
    run = mcmc.run_chains(
      run.rng_keys,
      problem.step,
      run.state,
      length - steps,
      parameters=(warm.step_size, *problem.rest),
      collector=collector,
      carry=run.carry,
      collector_parameters=(reference,),
      batch_size=row.batch_size,
    )
    carry = jax.device_get(run.carry)
    seconds = time.perf_counter() - start
    steps = length
    joint = None
    if row.polynomial:
      carry, joint = carry
      num_functions = carry.steps.mean.shape[-1]
      joint = mcmc.chain_data.split_shared(joint, num_functions)
    yield {
      "length": length,
      "step_size": float(warm.step_size),
      "acceptance_rate": float(np.mean(run.stats.acceptance_rate)),
      "max_r_hat": float(np.max(mcmc.estimate(carry).r_hat)),
      "seconds": seconds,
      "methods": methods(carry, joint, num_linear),
      **({"coverage": coverage(carry)} if row.calibrate else {}),
    }


def warm_up(row: Row, problem, rng_key, state):
  """(what warm-up leaves, the problem with its preconditioner)."""
  settings: dict[str, Any] = dict(start=0.5, target_acceptance=row.acceptance)
  if row.approach is not None:
    before = mcmc.adaptation.adapt_step_size(
      rng_key,
      problem.step,
      state,
      row.warm_up,
      rest=problem.rest,
      start=0.1,
      target_acceptance=row.approach,
    )
    rng_key, state = before.rng_keys, before.state
    settings["start"] = float(before.step_size)
  if problem.is_latent:
    warm = mcmc.adaptation.adapt_step_size(
      rng_key, problem.step, state, row.warm_up, rest=problem.rest, **settings
    )
    return warm, problem
  (a,) = problem.rest
  warm = mcmc.adaptation.warm_up(
    rng_key,
    problem.step,
    state,
    a,
    windows=row.windows,
    final_steps=row.warm_up,
    **settings,
  )
  if row.windows:
    problem = problem.with_reference(warm.mean, warm.preconditioner)
  return warm, problem


def methods(carry, joint, num_linear: int) -> dict:
  """Factors and errors of every way to control the means."""
  candidates = mcmc.control_variates.candidates(3)
  estimates = {
    name: mcmc.estimate(carry, c.cv_coef, terms=c.terms)
    for name, c in candidates.items()
  }
  estimates["two_least_squares"] = mcmc.estimate(
    carry, mcmc.estimates.LEAST_SQUARES, terms=(0, 1)
  )
  if carry.num_batches.shape[0] >= mcmc.estimates.MIN_CHAINS_FOR_MCSE:
    estimates["all_between_chains"] = mcmc.estimate(
      carry, mcmc.estimates.BETWEEN_CHAINS
    )
  others = {} if joint is None else {"polynomial": joint}
  if joint is not None:
    estimates["polynomial"] = mcmc.estimate(joint)._replace(
      variance=estimates["two"].variance
    )
  choice = mcmc.choose(carry, candidates, others=others)
  estimates["chosen"] = choice.estimate
  found = {name: spread(e, num_linear) for name, e in estimates.items()}
  names, counts = np.unique(choice.chosen, return_counts=True)
  found["chosen"]["counts"] = dict(zip(names, counts.tolist(), strict=True))
  return found


def coverage(carry) -> dict:
  """How often intervals of single chains hold the mean of all chains.

  Each chain's errors come from its own batch means; the mean of all is known
  better by the root of the number of chains.
  """
  truth = mcmc.choose(carry, mcmc.control_variates.candidates(3)).estimate.mean
  inside = {"plain": [], "controlled": []}
  for chain in range(carry.num_batches.shape[0]):
    one = jax.tree.map(lambda x, c=chain: x[c], carry)
    for name, estimate in (
      ("plain", mcmc.estimate(one, (), terms=())),
      ("controlled", mcmc.estimate(one)),
    ):
      bounds = [estimate.interval(level) for level in LEVELS]
      inside[name].append([(a < truth) & (truth < b) for a, b in bounds])
  return {
    "levels": LEVELS,
    **{name: np.mean(v, axis=(0, 2)).tolist() for name, v in inside.items()},
  }


def spread(estimate, num_linear: int) -> dict:
  """Min, median and max over coordinates, for means and for squares.

  `relative_error` is draws times the estimate's variance over the target's: 1
  is what independent exact draws would give.
  """
  relative = estimate.num_draws * estimate.mcse**2 / estimate.variance
  found = {}
  for kind, part in (
    ("linear", slice(0, num_linear)),
    ("square", slice(num_linear, None)),
  ):
    factor = estimate.factor[part]
    if factor.size:
      found[kind] = {
        "min": float(factor.min()),
        "median": float(np.median(factor)),
        "max": float(factor.max()),
        "share_at_least_1": float(np.mean(factor >= 1)),
        "relative_error": float(np.median(relative[part])),
      }
  return found


def both(a, b):
  """A collector whose carry is the pair of both carries."""

  def update(carry, state, info, *parameters):
    first, second = carry
    return (
      a.update(first, state, info, *parameters),
      b.update(second, state, info, *parameters),
    )

  def flush(carry):
    return a.flush(carry[0]), b.flush(carry[1])

  def open_both(carry, batch_size, *parameters):
    return tuple(
      one if c.open is None else c.open(one, batch_size, *parameters)
      for c, one in zip((a, b), carry, strict=True)
    )

  return mcmc.base.Collector(update, flush, open_both)
