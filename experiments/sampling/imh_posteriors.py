# SPDX-License-Identifier: Apache-2.0
"""Posterior means by independent Metropolis and its peers, over replicates."""

import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sampling import imh_peers, imh_targets
from unisparse_jax.mcmc import adaptive_independent_metropolis as adaptive
from unisparse_jax.mcmc import (
  estimates,
  expectations,
  flows,
  independent_blocks,
  proposal_fits,
)
from unisparse_jax.mcmc import independent_metropolis as sampler

# Rules from terms to an estimate: name -> (coefficients, terms).
RULES = {
  "im_plain": ((), ()),
  "im_waste_recycling": (sampler.WASTE_RECYCLING, sampler.BASIC),
  "im_fixed": (sampler.FIXED, sampler.BASIC),
  "im_two_terms": (estimates.BATCH_MEANS, sampler.BASIC),
  "im_five_terms": (estimates.BATCH_MEANS, None),
}


def fit(
  rng_key: Any, case: imh_targets.Case, how: dict
) -> tuple[Any, dict[str, Any]]:
  """A proposal for the case and what is known of it.

  Args:
    rng_key: one key.
    case: the posterior.
    how: `kind` "start" for the case's own Gaussian; "adapted" with
      `num_components` and fields of `FitSettings`; or "flow" with those fields
      and `num_layers`, `hidden` and `kept` of `flows.coupling`.
  """
  how = dict(how)
  kind = how.pop("kind")
  how.pop("label", None)
  if kind == "start":
    return case.start, {"kind": kind}
  shape = {
    name: how.pop(name)
    for name in ("num_components", "num_layers", "hidden", "kept")
    if name in how
  }
  start = case.start
  key_spread, key_fit = jax.random.split(rng_key)
  if kind == "flow":
    start = flows.coupling(key_spread, start, **shape)
  elif shape.get("num_components", 1) > 1:
    start = proposal_fits.spread(key_spread, start, **shape)
  settings = proposal_fits.FitSettings(**how)
  began = time.perf_counter()
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    result = adaptive.adapt(key_fit, case.logdensity_fn, start, settings)
  report = result.report._asdict()
  history = report.pop("acceptance_history")
  return result.proposal, {
    "kind": kind,
    **shape,
    **report,
    "acceptance_first_100": float(np.mean(history[:100]))
    if len(history)
    else None,
    "adapt_seconds": time.perf_counter() - began,
    "warned": [str(w.message) for w in caught],
  }


def replicate(
  rng_key: Any,
  case: imh_targets.Case,
  proposal: Any,
  num_draws: int,
  num_replicates: int,
) -> tuple[dict[str, imh_peers.Replicates], np.ndarray, np.ndarray]:
  """Independent Metropolis, each chain a replicate.

  Coefficients of one half of the chains serve the other half. Where E_q F is
  itself an estimate, all replicates share its error, which the replicates
  carry along; of H4, whose weight in it is a mean log-weight close to 0, that
  part is left out.

  Returns:
    Replicates by rule; the best pooled mean; and Var_pi F.
  """
  key_start, key_burn, key_run, key_known = jax.random.split(rng_key, 4)
  functional = expectations.means_and_squares(case.dim)
  known, known_error = imh_peers.known_means(key_known, functional, proposal)
  state = independent_blocks.init_chains(
    key_start, case.logdensity_fn, proposal, num_replicates
  )
  run = independent_blocks.run_chains(
    key_burn, case.logdensity_fn, proposal, state, 200,
    functional=functional, expectation=known,
  )  # fmt: skip
  run = independent_blocks.run_chains(
    key_run, case.logdensity_fn, proposal, run.state, num_draws,
    functional=functional, expectation=known,
  )  # fmt: skip
  notes = {"acceptance_rate": float(jnp.mean(run.stats.acceptance_rate))}
  found = {}
  for name, (coef, numbers) in RULES.items():
    result = estimates.estimate(run.carry, coef, terms=numbers)
    shared = np.zeros(2 * case.dim)
    if numbers != ():
      shared = np.abs(result.cv_coef[1]) * known_error
    found[name] = imh_peers.Replicates(
      result.chain_means, num_draws, 0, notes, shared
    )
  return found, result.mean, result.variance


def judge(
  replicates: imh_peers.Replicates,
  truth: np.ndarray,
  variance: np.ndarray,
  num_draws: int,
) -> dict[str, Any]:
  """Mean squared error against that of `num_draws` independent draws of pi."""
  error = replicates.means - truth
  mse = np.mean(error**2, axis=0) + replicates.shared_error**2
  gain = variance / num_draws / mse
  dim = len(gain) // 2
  out = {}
  for name, part in (("means", gain[:dim]), ("squares", gain[dim:])):
    out[name] = {
      "median": float(np.median(part)),
      "min": float(part.min()),
      "max": float(part.max()),
      "each": part,
    }
  bias = np.abs(error.mean(0)) / np.sqrt(variance)
  # Median over functions of standardised squared error times what it cost.
  spread = float(np.median(mse / variance))
  work = max(replicates.evaluations, 1)
  return {
    "gain": out,
    "gain_per_evaluation": float(1 / spread / work),
    "max_standardised_bias": float(bias.max()),
    "evaluations": replicates.evaluations,
    "gradients": replicates.gradients,
    # Share of the squared error that comes from E_q F.
    "share_of_shared_error": float(np.median(replicates.shared_error**2 / mse)),
    **replicates.notes,
  }


def measure(
  case: imh_targets.Case,
  fits: list[dict],
  peers: tuple[str, ...],
  *,
  num_draws: int,
  num_replicates: int,
  nuts_draws: int,
  nuts_chains: int,
  seed: int,
):
  """All methods on one case; yields (method, fit label, values)."""
  keys = iter(jax.random.split(jax.random.key(seed), 100))
  pending = []
  best = (np.inf, np.zeros(0), np.zeros(0))
  for how in fits:
    label = how["label"]
    proposal, about = fit(next(keys), case, how)
    found, mean, variance = replicate(
      next(keys), case, proposal, num_draws, num_replicates
    )
    if "snis" in peers:
      found |= imh_peers.importance_sampling(
        next(keys), case, proposal, num_draws, num_replicates
      )
    error = found["im_five_terms"].means.var(0).sum()
    if error < best[0]:
      best = (error, mean, variance)
    pending += [(method, label, about, r) for method, r in found.items()]
  if "pathfinder" in peers:
    found = imh_peers.pathfinder_psis(
      next(keys), case, num_draws, num_replicates
    )
    pending += [(method, "pathfinder", {}, r) for method, r in found.items()]
  if "nuts" in peers:
    found = imh_peers.nuts(next(keys), case, nuts_draws, nuts_chains)
    pending += [(method, "none", {}, r) for method, r in found.items()]
  # Where no exact moments exist, the pooled mean of the most precise run is
  # the truth: its error is that of one replicate over sqrt(num_replicates).
  truth, variance = case.moments or best[1:]
  for method, label, about, replicates in pending:
    draws = nuts_draws if method == "nuts" else num_draws
    yield (
      method,
      label,
      {
        **judge(replicates, truth, variance, draws),
        "proposal": about,
        "truth": "exact" if case.moments else "most precise run",
      },
    )
