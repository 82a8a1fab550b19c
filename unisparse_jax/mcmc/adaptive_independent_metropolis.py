# SPDX-License-Identifier: Apache-2.0
"""Independent Metropolis whose proposal learns the target, then is frozen.

Two ways to bring a Gaussian or a mixture of Gaussians q closer to pi:

- `proposal_fits.fit_reverse_kl` descends KL(q || pi) by reparameterised
  gradients. It needs gradients of the log-density and finds the target from
  afar, but tends to a q that is too narrow.
- `proposal_fits.fit_forward_kl` descends KL(pi || q) along chains of the
  sampler itself, by stochastic approximation of EM (moment matching, for one
  component). Each step uses every proposal: with acceptance probability alpha
  the point of weight alpha is y, and that of weight 1 - alpha is x. No
  gradients.

Or q is a flow, fitted in the same two ways by `flow_fits`. On the posterior of
31 coefficients of breast cancer, with 64 gradients a step, the best Gaussian
ends at KL 0.25 and acceptance 0.65, a flow of 6 layers at 0.02 and 0.90.

`adapt` runs the one, the other or both, mixes in a heavy-tailed part that keeps
pi / q bounded, freezes the result, and judges it: only then may control
variates be accumulated, since E_q F belongs to one q.

Source: arXiv 2406.17699 (an adaptive sampler whose KL falls); both recursions
are our own reading. Step sizes 0.5 / (t + 20)^0.75 sum to infinity and their
squares do not: diminishing adaptation.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unisparse_jax.mcmc import (
  flow_fits,
  flows,
  independent_blocks,
  proposal_fits,
  proposals,
)
from unisparse_jax.mcmc import independent_metropolis as sampler


class Report(NamedTuple):
  """How good a frozen proposal is.

  Attributes:
    acceptance_rate: of the frozen chains.
    max_weight_ratio: largest w over mean w among fresh draws of q.
    pareto_k: shape of the tail of w; the variance of w is finite below 0.5,
      and weights are of use below 0.7. None where arviz is not installed.
    kl_reverse: estimate of KL(q || pi) from the same draws, nats.
    kl_forward: estimate of KL(pi || q) from them, nats; both biased low where
      weights are heavy-tailed.
    num_draws: number of these draws.
    num_evaluations: of the log-density, by the whole adaptation.
    acceptance_history: mean over chains at each forward step.
  """

  acceptance_rate: float
  max_weight_ratio: float
  pareto_k: float | None
  kl_reverse: float
  kl_forward: float
  num_draws: int
  num_evaluations: int
  acceptance_history: np.ndarray


class Adaptation(NamedTuple):
  """Result of `adapt`.

  Attributes:
    proposal: frozen; a `Mixture` of the fit and its heavy part, a flow with
      such a base, or the fit.
    state: of chains in equilibrium under it, to go on from.
    report: what it is worth.
  """

  proposal: Any
  state: sampler.IMState
  report: Report


def adapt(
  rng_key: Any,
  logdensity_fn: Callable,
  start: Any,
  settings: proposal_fits.FitSettings | None = None,
) -> Adaptation:
  """Fits a proposal to the target, freezes it and reports what it is worth.

  Args:
    rng_key: one key.
    logdensity_fn: vector -> unnormalised log-density.
    start: `Gaussian`, `GaussianMixture` or `flows.Flow` to begin with; the
      number of components or layers stays. `proposal_fits.spread` makes a
      mixture of a Gaussian, `flows.coupling` a flow.
    settings: default `proposal_fits.FitSettings()`.

  Returns:
    The adaptation.

  Raises:
    ValueError: start is of another kind.

  Warns:
    RuntimeWarning: the estimated max w / mean w is above the limit; the message
      gives it with Pareto k and the acceptance rate.
  """
  settings = proposal_fits.FitSettings() if settings is None else settings
  fits = flow_fits if isinstance(start, flows.Flow) else proposal_fits
  fits.check_start(start)
  key_reverse, key_forward, key_start, key_run = jax.random.split(rng_key, 4)
  fitted, evaluations = start, 0
  history = np.zeros(0)
  if settings.objective in (proposal_fits.REVERSE, proposal_fits.BOTH):
    fitted = fits.fit_reverse_kl(key_reverse, logdensity_fn, fitted, settings)
    is_mixture = isinstance(fitted, proposals.GaussianMixture)
    count = fitted.num_components if is_mixture else 1
    evaluations += settings.gradient_steps * settings.gradient_draws * count
  if settings.objective in (proposal_fits.FORWARD, proposal_fits.BOTH):
    fitted, rates = fits.fit_forward_kl(
      key_forward, logdensity_fn, fitted, settings
    )
    history = np.asarray(rates)
    evaluations += settings.num_steps * settings.num_chains
  proposal = proposal_fits.with_heavy_part(fitted, settings)
  state = independent_blocks.init_chains(
    key_start, logdensity_fn, proposal, settings.num_chains
  )
  key_run, key_draws = jax.random.split(key_run)
  run = independent_blocks.run_chains(
    key_run,
    logdensity_fn,
    proposal,
    state,
    settings.num_frozen_steps,
    expectation=jnp.zeros_like(state.position[0]),  # no estimate is made
    block_size=settings.num_frozen_steps,
  )
  num_draws = settings.num_frozen_steps * settings.num_chains
  evaluations += 2 * num_draws + 32 * settings.num_chains
  log_weights = _fresh_log_weights(
    key_draws, logdensity_fn, proposal, num_draws
  )
  report = judge(np.asarray(log_weights))._replace(
    acceptance_rate=float(jnp.mean(run.stats.acceptance_rate)),
    num_evaluations=evaluations,
    acceptance_history=history,
  )
  if not report.max_weight_ratio <= settings.max_weight_ratio:
    k = "unknown" if report.pareto_k is None else f"{report.pareto_k:.2f}"
    warnings.warn(
      "The fitted proposal misses part of the target: largest weight "
      f"{report.max_weight_ratio:.3g} times the mean among {num_draws} draws "
      f"(limit {settings.max_weight_ratio:g}), Pareto k {k}, acceptance "
      f"{report.acceptance_rate:.2f}. Chains can stick there. Use more "
      "components, more steps or a larger heavy_weight.",
      RuntimeWarning,
      stacklevel=2,
    )
  return Adaptation(proposal, run.state, report)


def judge(log_weights: np.ndarray) -> Report:
  """Diagnostics of log pi - log q at draws of q.

  Args:
    log_weights: [num_draws], of any constant offset; -inf where pi is 0.
  """
  log_weights = np.asarray(log_weights, np.float64)
  log_weights = np.where(np.isfinite(log_weights), log_weights, -np.inf)
  top = log_weights.max()
  weights = np.exp(log_weights - top)
  log_mean = float(np.log(weights.mean()))
  finite = log_weights[np.isfinite(log_weights)] - top
  share = np.exp(finite) / weights.sum()
  return Report(
    acceptance_rate=float("nan"),
    max_weight_ratio=float(np.exp(-log_mean)),
    pareto_k=pareto_k(log_weights),
    kl_reverse=log_mean - float(finite.mean()),
    kl_forward=float(share @ finite) - log_mean,
    num_draws=log_weights.size,
    num_evaluations=log_weights.size,
    acceptance_history=np.zeros(0),
  )


def pareto_k(log_weights: np.ndarray) -> float | None:
  """Shape of a Pareto tail fitted to the largest weights, by arviz.

  None where arviz is not installed; -inf where all weights are equal.
  """
  if np.ptp(log_weights) < 1e-9:
    return float("-inf")
  try:
    from arviz_stats import base as arviz  # Optional: the `mcmc` extra.
  except ImportError:
    return None
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # It warns of what the report says.
    # It takes log-likelihoods left out, the negatives of log-weights.
    finite = -np.maximum(log_weights, -1e300)
    _, shape = arviz.array_stats.psislw(finite)  # pyright: ignore
  return float(shape)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _fresh_log_weights(rng_key, logdensity_fn, proposal, num_draws):
  def one_draw(key):
    position = proposal.sample(key)
    return logdensity_fn(position) - proposal.logdensity(position)

  return jax.vmap(one_draw)(jax.random.split(rng_key, num_draws))
