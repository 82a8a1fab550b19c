# SPDX-License-Identifier: Apache-2.0
"""Warm-up: step size and preconditioner from the chains, then frozen.

All samplers of the package take step_size as their first parameter; what
follows it is called `rest` here. All chains share both.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unisparse_jax.mcmc import accumulators, base, checks, estimates
from unisparse_jax.mcmc import preconditioner as preconditioners

# The paper's scripts aim at 0.774 on logistic regression, 0.75 on Gaussian
# process classification and 0.82 on Cox processes. With the two Poisson terms
# alone a controlled mean wants more: going from 0.77 to 0.92 its variance fell
# by 1.7, 3.6 and 4.5 on three logistic posteriors. With the score it changed by
# 0.7, 1.0 and 1.7 only (breast cancer with 31 and 11 coefficients, diabetes;
# results/variance_reduction_cpu.jsonl), so that `tune_step_size` may be worth
# its pilot runs.
PLAIN_ACCEPTANCE = 0.775
CONTROLLED_ACCEPTANCE = 0.92
PLAIN, CONTROLLED = "plain", "controlled"
KINDS = ("diagonal", "dense", "eigen")
_SHRINKAGE = 5.0
# Of step_size: at 2 a proposal has no noise, and a chain goes back and forth.
_SMALLEST, _LARGEST = 1e-6, 1.99


class Adapted(NamedTuple):
  """What warm-up leaves; pass it on and change it no more.

  Attributes:
    state: of all chains.
    rng_keys: of all chains.
    step_size: in (0, 2).
    mean: of the positions in the last window, raveled.
    preconditioner: in use; None for samplers without one.
    acceptance_rate: mean over chains and the second half of the last window.
  """

  state: Any
  rng_keys: Any
  step_size: Float[Array, ""]
  mean: Float[Array, " dim"]
  preconditioner: Any
  acceptance_rate: Float[Array, ""]


class Window(NamedTuple):
  """Result of `adapt_step_size`.

  Attributes:
    state: of all chains.
    rng_keys: of all chains.
    step_size: geometric-like mean over the second half.
    acceptance_rate: mean over chains and the second half.
    mean: of positions over chains and steps, [dim].
    covariance: of them, [dim, dim]; None where not asked for.
  """

  state: Any
  rng_keys: Any
  step_size: Float[Array, ""]
  acceptance_rate: Float[Array, ""]
  mean: Float[Array, " dim"]
  covariance: Any


def adapt_step_size(
  rng_key: Any,
  step: Callable,
  state: Any,
  num_steps: int,
  *,
  rest: tuple = (),
  start: Any = 1.0,
  target_acceptance: float = PLAIN_ACCEPTANCE,
  covariance: bool = False,
) -> Window:
  """Moves step_size towards an acceptance rate while the chains run.

  step_size = 2 / (1 + exp(-w)), kept in [1e-6, 1.99]. After step i,
  w += 2 (i + 1)^-0.6 (mean acceptance probability - target); the result is at
  the mean of w over the second half.

  Args:
    rng_key: one key, or one for each chain.
    step: (rng_key, state, step_size, *rest) -> (state, info).
    state: leaves [num_chains, ...].
    num_steps: of this window.
    rest: further parameters of the step.
    start: first step_size.
    target_acceptance: in (0, 1).
    covariance: whether the covariance of the positions is estimated, dim^2.

  Returns:
    The window.

  Raises:
    ValueError: an argument out of range, or no chain.
  """
  checks.check_positive_int("num_steps", num_steps)
  checks.check_open_interval("start", start, 0, 2)
  checks.check_open_interval("target_acceptance", target_acceptance, 0, 1)
  rng_keys = base.chain_keys(rng_key, base.check_num_chains(state))
  base.check_parameters(step, state, (start, *rest))
  return _adapt(
    rng_keys,
    step,
    state,
    jnp.int32(num_steps),
    rest,
    jnp.asarray(start, jnp.float32),
    jnp.asarray(target_acceptance, jnp.float32),
    covariance,
  )


def warm_up(
  rng_key: Any,
  step: Callable,
  state: Any,
  preconditioner: Any,
  *,
  rest_fn: Callable | None = None,
  kind: str = "dense",
  windows: Sequence[int] = (200, 300, 500),
  final_steps: int = 500,
  start: Any = 1.0,
  target_acceptance: float = PLAIN_ACCEPTANCE,
) -> Adapted:
  """Adapts step_size in every window and the preconditioner after each.

  The preconditioner is the covariance of the window's positions over all
  chains, shrunk to its diagonal by 5 draws' worth. Without windows it stays
  what it was, such as that of `laplace`.

  Args:
    rng_key: one key, or one for each chain.
    step: (rng_key, state, step_size, *rest) -> (state, info).
    state: leaves [num_chains, ...].
    preconditioner: the first one.
    rest_fn: (mean, preconditioner) -> parameters after step_size; default the
      preconditioner alone, as `gi_mala` takes it.
    kind: of the estimated preconditioners: "diagonal", "dense" or "eigen".
    windows: steps of each, each followed by a new preconditioner.
    final_steps: of the last window, which adapts step_size alone.
    start: first step_size.
    target_acceptance: in (0, 1).

  Returns:
    What to sample with.

  Raises:
    ValueError: as `adapt_step_size`, or an unknown kind.
  """
  checks.check_choice("kind", kind, KINDS)
  rest_fn = rest_fn or (lambda mean, preconditioner: (preconditioner,))
  position = state.position
  mean = jax.vmap(lambda p: base.ravel(p)[0])(position).mean(0)
  step_size = start
  for number, num_steps in enumerate([*windows, final_steps]):
    is_last = number == len(windows)
    window = adapt_step_size(
      rng_key,
      step,
      state,
      num_steps,
      rest=rest_fn(mean, preconditioner),
      start=step_size,
      target_acceptance=target_acceptance,
      covariance=not is_last,
    )
    rng_key, state, step_size = window.rng_keys, window.state, window.step_size
    if not is_last:
      mean = window.mean
      preconditioner = _estimated(window.covariance, kind)
  return Adapted(
    state, rng_key, step_size, mean, preconditioner, window.acceptance_rate
  )


class Tuning(NamedTuple):
  """Result of `tune_step_size`.

  Attributes:
    step_size: the best of the grid.
    state: of all chains after the pilot runs.
    rng_keys: of all chains.
    errors: mcse^2 times draws over the target's variance, median over the
      functions, for each step size: 1 is independent exact draws.
    acceptance_rates: of each step size.
  """

  step_size: float
  state: Any
  rng_keys: Any
  errors: Float[np.ndarray, " grid"]
  acceptance_rates: Float[np.ndarray, " grid"]


def tune_step_size(
  rng_key: Any,
  step: Callable,
  state: Any,
  collector: base.Collector,
  carry: Any,
  *,
  candidates: Any = None,
  objective: str = CONTROLLED,
  rest: tuple = (),
  reference_fn: Callable,
  grid: Sequence[float] = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0),
  num_steps: int = 1000,
  batch_size: int = 50,
) -> Tuning:
  """Picks the step size by what is wanted: the error of the estimate itself.

  An acceptance rate is only a proxy of it. Each step size of the grid has a
  pilot run, starting where the one before ended.

  Args:
    rng_key: one key, or one for each chain.
    step: (rng_key, state, step_size, *rest) -> (state, info).
    state: leaves [num_chains, ...].
    collector: of `control_variates`.
    carry: its empty start.
    candidates: for `estimates.choose`; needed by objective "controlled".
    objective: "controlled" for the error of the controlled means, "plain" for
      that of the plain ones, which is the effective sample size.
    rest: further parameters of the step.
    reference_fn: step_size -> `poisson.Reference`.
    grid: of step sizes.
    num_steps: of each pilot run.
    batch_size: as in `base.run_chains`.

  Returns:
    The tuning.

  Raises:
    ValueError: an unknown objective, or an empty grid.
  """
  checks.check_choice("objective", objective, (PLAIN, CONTROLLED))
  checks.require(len(grid) > 0, "grid", "not be empty", grid)
  checks.check_open_interval("grid", grid, 0, 2)
  errors, rates = [], []
  for step_size in grid:
    dtype = jnp.result_type(*jax.tree.leaves(state.position))
    run = base.run_chains(
      rng_key,
      step,
      state,
      num_steps,
      parameters=(jnp.asarray(step_size, dtype), *rest),
      collector=collector,
      carry=carry,
      collector_parameters=(reference_fn(jnp.asarray(step_size, dtype)),),
      batch_size=batch_size,
    )
    rng_key, state = run.rng_keys, run.state
    if objective == PLAIN:
      result = estimates.estimate(run.carry, (), terms=())
    else:
      result = estimates.choose(run.carry, candidates or {}).estimate
    relative = result.num_draws * result.mcse**2 / result.variance
    errors.append(float(np.median(relative)))
    rates.append(float(np.mean(run.stats.acceptance_rate)))
  best = int(np.argmin(errors))
  return Tuning(
    float(grid[best]), state, rng_key, np.array(errors), np.array(rates)
  )


@functools.partial(jax.jit, static_argnums=(1, 7))
def _adapt(
  rng_keys, step, state, num_steps, rest, start, target_acceptance, covariance
):
  one = jax.tree.map(lambda x: x[0], state.position)
  first, _ = base.ravel(one)
  dim, dtype = first.shape[0], accumulators.dtype()
  num_chains = rng_keys.shape[0]

  def one_step(number, carry):
    rng_keys, state, logit, logit_sum, rate_sum, moments = carry
    step_size = (2 * jax.nn.sigmoid(logit)).astype(first.dtype)
    pairs = jax.vmap(jax.random.split)(rng_keys)
    rng_keys, step_keys = pairs[:, 0], pairs[:, 1]
    state, info = jax.vmap(lambda k, s: step(k, s, step_size, *rest))(
      step_keys, state
    )
    rate = jnp.mean(info.acceptance_rate).astype(jnp.float32)
    number_ = number.astype(jnp.float32)
    logit += 2 * (number_ + 1) ** -0.6 * (rate - target_acceptance)
    logit = jnp.clip(logit, _logit(_SMALLEST), _logit(_LARGEST))
    is_late = (number >= num_steps // 2).astype(jnp.float32)
    vectors = jax.vmap(lambda p: base.ravel(p)[0])(state.position)
    moments = _add_chains(moments, vectors.astype(dtype), covariance)
    logit_sum += is_late * logit
    return rng_keys, state, logit, logit_sum, rate_sum + is_late * rate, moments

  zero = jnp.zeros((), jnp.float32)
  products = jnp.zeros((dim, dim) if covariance else (), dtype)
  moments = (jnp.zeros((), dtype), jnp.zeros((dim,), dtype), products)
  logit = jnp.log(start) - jnp.log(2 - start)
  start_carry = (rng_keys, state, logit, zero, zero, moments)
  rng_keys, state, _, logit_sum, rate_sum, moments = jax.lax.fori_loop(
    0, num_steps, one_step, start_carry
  )
  late = (num_steps - num_steps // 2).astype(jnp.float32)
  count, mean, products = moments
  estimate = None
  if covariance:
    estimate = products / jnp.maximum(count * num_chains - 1, 1)
    # Chains started at one point know nothing of the scale at first.
    diagonal = jnp.diag(jnp.diagonal(estimate))
    total = count * num_chains
    estimate = (total * estimate + _SHRINKAGE * diagonal) / (total + _SHRINKAGE)
    estimate = estimate.astype(first.dtype)
  return Window(
    state,
    rng_keys,
    (2 * jax.nn.sigmoid(logit_sum / late)).astype(first.dtype),
    rate_sum / late,
    mean.astype(first.dtype),
    estimate,
  )


def _logit(step_size):
  return math.log(step_size) - math.log(2 - step_size)


def _add_chains(moments, vectors, covariance):
  """Adds one vector of each chain to (steps, mean, centred products)."""
  count, mean, products = moments
  num_chains = vectors.shape[0]
  new_mean = vectors.mean(0)
  delta = new_mean - mean
  share = 1 / (count + 1)
  if covariance:
    centred = vectors - new_mean[None]
    outer = delta[:, None] * delta[None]
    products += centred.T @ centred + count * share * num_chains * outer
  return count + 1, mean + share * delta, products


def _estimated(covariance, kind):
  if kind == "diagonal":
    return preconditioners.Diagonal(jnp.diagonal(covariance))
  if kind == "dense":
    return preconditioners.Dense(covariance, jnp.linalg.cholesky(covariance))
  values, vectors = jnp.linalg.eigh(covariance)
  tiny = jnp.finfo(values.dtype).eps * values[-1]
  return preconditioners.Eigen(vectors, jnp.maximum(values, tiny))
