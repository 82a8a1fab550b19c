# SPDX-License-Identifier: Apache-2.0
"""A million proposals of a thousand chains: ours, or BlackJAX's irmh.

The target is a logistic regression of dimension 30 on data made from a seed;
the proposal is its Laplace approximation with the covariance inflated by 1.1.
Both samplers draw from the same proposal in float32 and estimate the same
means, so that two records of different machines can be compared.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sampling import mcmc_problems
from unisparse_jax.mcmc import (
  estimates,
  independent_blocks,
  laplace,
  proposals,
  targets,
)

SHOWN = (
  "proposals_per_second",
  "seconds",
  "compile_seconds",
  "acceptance_rate",
)
OURS, BLACKJAX = "ours", "blackjax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
  """Settings.

  Attributes:
    implementation: "ours" or "blackjax".
    dim: coefficients.
    num_data: rows.
    num_chains: chains.
    num_steps: of each.
    block_size: steps drawn at once by ours.
    num_terms: control-variate terms that ours accumulates.
    repeats: timed runs; the fastest and the median are recorded.
    seed: of data and runs.
  """

  implementation: str = OURS
  dim: int = 30
  num_data: int = 500
  num_chains: int = 1_000
  num_steps: int = 1_000
  block_size: int = 100
  num_terms: int = 2
  repeats: int = 5
  seed: int = 0


def problem(settings: Throughput) -> tuple[Any, proposals.Gaussian]:
  """Log-density and proposal, float32."""
  features, labels = mcmc_problems.simulated(
    settings.num_data, settings.dim, settings.seed
  )
  target = targets.logistic_regression(
    features, labels, intercept=False, dtype=jnp.float32
  )
  fit = laplace.laplace(target.logdensity_fn, target.start)
  covariance = np.asarray(fit.covariance) * 1.1
  return target.logdensity_fn, proposals.gaussian(
    fit.mean, jnp.asarray((covariance + covariance.T) / 2)
  )


def measure(settings: Throughput):
  """Yields one (method, label, values)."""
  # Short products in TF32 would blur log-weights by more than 1e-3.
  with jax.default_matmul_precision("highest"):
    yield _measure(settings)


def _measure(settings: Throughput) -> tuple[str, str, dict[str, Any]]:
  logdensity_fn, proposal = problem(settings)
  build = {OURS: _ours, BLACKJAX: _blackjax}[settings.implementation]
  run, summarise = build(settings, logdensity_fn, proposal)
  keys = jax.random.split(jax.random.key(settings.seed), settings.repeats + 1)
  began = time.perf_counter()
  jax.block_until_ready(run(keys[0]))
  first = time.perf_counter() - began
  seconds, cpu_seconds, results = [], [], []
  for key in keys[1:]:
    began, cpu_began = time.perf_counter(), time.process_time()
    results.append(jax.block_until_ready(run(key)))
    seconds.append(time.perf_counter() - began)
    cpu_seconds.append(time.process_time() - cpu_began)
  median = float(np.median(seconds))
  total = settings.num_chains * settings.num_steps
  return (
    settings.implementation,
    "laplace_1.1",
    {
      "proposals_per_second": total / median,
      "seconds": median,
      "best_seconds": min(seconds),
      # On a CPU shared with other work: what all cores would do if idle.
      "cpu_seconds": min(cpu_seconds),
      "compile_seconds": first - median,
      **summarise(results[-1]),
      "throughput_settings": dataclasses.asdict(settings),
    },
  )


def _ours(settings, logdensity_fn, proposal):
  @jax.jit
  def run(key):
    key_start, key_run = jax.random.split(key)
    state = independent_blocks.init_chains(
      key_start, logdensity_fn, proposal, settings.num_chains, candidates=1
    )
    return independent_blocks.run_chains(
      key_run, logdensity_fn, proposal, state, settings.num_steps,
      num_terms=settings.num_terms, block_size=settings.block_size,
    )  # fmt: skip

  def summarise(run):
    result = estimates.estimate(run.carry, estimates.BATCH_MEANS)
    return {
      "acceptance_rate": float(jnp.mean(run.stats.acceptance_rate)),
      "mean": result.plain_mean,
      "mcse": result.plain_mcse,
      "controlled_mean": result.mean,
      "controlled_mcse": result.mcse,
    }

  return run, summarise


def _blackjax(settings, logdensity_fn, proposal):
  """As its documentation has it: a scan over steps of a vmap over chains.

  Its `proposal_logdensity_fn` is given, without which the answer is wrong.
  Means are summed in the scan: 1e6 stored states would be slower still.
  """
  import blackjax  # Optional: the `mcmc` extra.

  algorithm = blackjax.irmh(
    logdensity_fn,
    proposal.sample,
    lambda state, new: proposal.logdensity(new.position),
  )

  @jax.jit
  def run(key):
    key_start, key_run = jax.random.split(key)
    start = jax.vmap(proposal.sample)(
      jax.random.split(key_start, settings.num_chains)
    )
    state = jax.vmap(algorithm.init)(start)

    def step(carry, step_key):
      state, total, rate = carry
      keys = jax.random.split(step_key, settings.num_chains)
      state, info = jax.vmap(algorithm.step)(keys, state)
      rate = rate + jnp.mean(info.acceptance_rate)
      return (state, total + state.position, rate), None

    carry = (state, jnp.zeros_like(start), jnp.zeros(()))
    (_, total, rate), _ = jax.lax.scan(
      step, carry, jax.random.split(key_run, settings.num_steps)
    )
    return total / settings.num_steps, rate / settings.num_steps

  def summarise(result):
    means, rate = map(np.asarray, result)
    return {
      "acceptance_rate": float(rate),
      "mean": means.mean(0),
      "mcse": means.std(0, ddof=1) / np.sqrt(settings.num_chains),
    }

  return run, summarise
