# SPDX-License-Identifier: Apache-2.0
"""What independent Metropolis is compared with, on the same posteriors.

Each gives replicated estimates of (E x, E x^2), [num_replicates, 2 dim], so
that all are judged by their error over replicates.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sampling import imh_targets
from unisparse_jax.mcmc import expectations, flows


class Replicates(NamedTuple):
  """Estimates and what each of them cost.

  Attributes:
    means: [num_replicates, 2 dim].
    evaluations: of the log-density, per replicate.
    gradients: of it, per replicate.
    notes: further numbers for the record.
    shared_error: standard error that all replicates share and their spread
      does not show: that of an estimated E_q F, [2 dim].
  """

  means: np.ndarray
  evaluations: float
  gradients: float
  notes: dict
  shared_error: Any = 0.0


def known_means(
  rng_key: Any, functional: Any, proposal: Any
) -> tuple[Any, np.ndarray]:
  """E_q F and its standard error: in closed form, or for a flow estimated."""
  if isinstance(proposal, flows.Flow):
    mean, error = flows.expectation(rng_key, functional, proposal)
    return mean, np.asarray(error)
  mean = expectations.expectation(functional, proposal)
  return mean, np.zeros(mean.shape)


def importance_sampling(
  rng_key: Any,
  case: imh_targets.Case,
  proposal: Any,
  num_draws: int,
  num_replicates: int,
) -> dict[str, Replicates]:
  """Self-normalised importance sampling from the same proposal.

  Alone, and with the same known mean: F(y) - E_q F as a control variate, its
  coefficient by the regression that minimises the delta-method variance.
  """
  functional = expectations.means_and_squares(case.dim)
  key_known, rng_key = jax.random.split(rng_key)
  known, known_error = known_means(key_known, functional, proposal)

  @jax.jit
  def one(key):
    drawn = jax.vmap(proposal.sample)(jax.random.split(key, num_draws))
    level = jax.vmap(case.logdensity_fn)(drawn) - jax.vmap(proposal.logdensity)(
      drawn
    )
    level = jnp.where(jnp.isfinite(level), level, -jnp.inf)
    share = jax.nn.softmax(level)
    values = jax.vmap(functional)(drawn)
    mean = share @ values
    # The estimator's linear part, and the control variate, per draw.
    part = num_draws * share[:, None] * (values - mean[None])
    centred = values - jnp.mean(values, axis=0)[None]
    coef = jnp.sum(part * centred, axis=0) / jnp.sum(centred**2, axis=0)
    return mean, mean - coef * (jnp.mean(values, axis=0) - known)

  plain, controlled = jax.lax.map(
    one, jax.random.split(rng_key, num_replicates)
  )
  return {
    "snis": Replicates(np.asarray(plain), num_draws, 0, {}),
    # Its coefficient is close to 1.
    "snis_controlled": Replicates(
      np.asarray(controlled), num_draws, 0, {}, known_error
    ),
  }


def pathfinder_psis(
  rng_key: Any, case: imh_targets.Case, num_draws: int, num_replicates: int
) -> dict[str, Replicates]:
  """Draws of BlackJAX's Pathfinder with Pareto-smoothed weights, and without.

  One fit from the start's mean; replicates are fresh draws of it. The L-BFGS
  path is not counted as evaluations.
  """
  # Optional: the `mcmc` extra.
  import blackjax
  from blackjax import diagnostics

  key_fit, key_draws = jax.random.split(rng_key)
  fit, _ = jax.jit(
    functools.partial(
      blackjax.vi.pathfinder.approximate, logdensity_fn=case.logdensity_fn
    )
  )(key_fit, initial_position=case.start.mean)
  functional = expectations.means_and_squares(case.dim)

  @jax.jit
  def one(key):
    drawn, log_q = blackjax.vi.pathfinder.sample(key, fit, num_draws)
    level = jax.vmap(case.logdensity_fn)(drawn) - log_q
    level = jnp.where(jnp.isfinite(level), level, -1e30)
    smoothed, shape = diagnostics.psis_weights(level)
    values = jax.vmap(functional)(drawn)
    return jnp.exp(smoothed) @ values, jnp.mean(values, axis=0), shape

  weighted, plain, shapes = jax.lax.map(
    one, jax.random.split(key_draws, num_replicates)
  )
  notes = {"pareto_k": float(np.median(shapes))}
  return {
    "pathfinder_psis": Replicates(np.asarray(weighted), num_draws, 0, notes),
    "pathfinder": Replicates(np.asarray(plain), 0, 0, notes),
  }


def nuts(
  rng_key: Any,
  case: imh_targets.Case,
  num_draws: int,
  num_chains: int,
  num_warmup: int = 500,
) -> dict[str, Replicates]:
  """BlackJAX NUTS after window adaptation of one chain; a chain a replicate."""
  import blackjax  # Optional: the `mcmc` extra.

  key_warmup, key_run = jax.random.split(rng_key)
  warmup = blackjax.window_adaptation(blackjax.nuts, case.logdensity_fn)
  (state, parameters), _ = warmup.run(
    key_warmup, case.start.mean, num_steps=num_warmup
  )
  sampler = blackjax.nuts(case.logdensity_fn, **parameters)
  functional = expectations.means_and_squares(case.dim)

  def one_chain(key):
    def step(carry, step_key):
      state, total, work = carry
      state, info = sampler.step(step_key, state)
      total = total + functional(state.position)
      return (state, total, work + info.num_integration_steps), None

    key_burn, key_keep = jax.random.split(key)
    zero = jnp.zeros_like(functional(state.position))
    burnt, _ = jax.lax.scan(
      step, (state, zero, 0), jax.random.split(key_burn, 100)
    )
    kept, _ = jax.lax.scan(
      step, (burnt[0], zero, 0), jax.random.split(key_keep, num_draws)
    )
    return kept[1] / num_draws, kept[2]

  keys = jax.random.split(key_run, num_chains)
  means, work = jax.jit(jax.vmap(one_chain))(keys)
  gradients = float(np.mean(work))
  return {"nuts": Replicates(np.asarray(means), gradients, gradients, {})}
