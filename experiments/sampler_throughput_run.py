# SPDX-License-Identifier: Apache-2.0
"""Timings of thousands of chains at once; see `sampler_throughput`."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import mcmc_peers, mcmc_problems, mcmc_runs
from unisparse_jax import mcmc


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(mcmc_runs.Settings):
  """Of the experiment.

  Attributes:
    target: of logistic regression, see `mcmc_problems.make`.
    num_chains: at once.
    num_steps: of our sampler, after warm-up; a multiple of batch_size.
    warm_up: steps that adapt step sizes.
    batch_size: steps of a batch mean.
    acceptances: that our sampler is tuned to, one run each.
    nuts_steps: steps of NUTS; 0 leaves it out.
    repeats: of each timed run; the median counts.
    dtype: "float32" or "float64".
    precision: of matrix products: "highest" for all digits of the dtype, or
      "default", which on a GPU may round inputs to 10 bits.
    seed: of everything.
  """

  target: str
  num_chains: int = 10_000
  num_steps: int = 1000
  warm_up: int = 300
  batch_size: int = 50
  acceptances: tuple[float, ...] = (0.775, 0.92)
  nuts_steps: int = 50
  repeats: int = 3
  dtype: str = "float32"
  precision: str = "highest"


def measure(problem, settings: Settings):
  """Yields one measurement after another."""
  features, _ = mcmc_problems.labelled(settings.target)
  shape = (len(features), problem.target.dim)
  yield {"kind": "products", **time_products(shape, settings)}
  padded = (-(-shape[0] // 64) * 64, -(-shape[1] // 32) * 32)
  yield {"kind": "products_padded", **time_products(padded, settings)}
  yield {"kind": "gradient", **time_gradient(problem, settings)}
  for acceptance in settings.acceptances:
    yield from ours(problem, settings, acceptance)
  if settings.nuts_steps:
    yield {"kind": "nuts", **nuts(problem, settings)}


def timed(fn, repeats: int):
  """(seconds, last result) of fn(); see `timed_in_turn`."""
  ((seconds, result),) = timed_in_turn([fn], repeats)
  return seconds, result


def timed_in_turn(fns, repeats: int):
  """(seconds, last result) of each function, after one call of each.

  They take turns, so that what else the machine does falls on all alike. The
  median of the wall clock on an accelerator. On a CPU, the least time of all
  threads of this process, which other work hardly moves: with one thread
  (XLA_FLAGS=--xla_cpu_multi_thread_eigen=false) it is the wall clock of a
  machine that does nothing else.
  """
  results = [jax.block_until_ready(fn()) for fn in fns]
  on_cpu = jax.default_backend() == "cpu"
  clock = time.process_time if on_cpu else time.perf_counter
  seconds = np.empty((repeats, len(fns)))
  for repeat in range(repeats):
    for number, fn in enumerate(fns):
      start = clock()
      results[number] = jax.block_until_ready(fn())
      seconds[repeat, number] = clock() - start
  best = seconds.min(0) if on_cpu else np.median(seconds, axis=0)
  return list(zip(best.tolist(), results, strict=True))


def time_products(shape: tuple[int, int], settings: Settings) -> dict:
  """The two batched matrix products of a gradient, and nothing else.

  Args:
    shape: rows and columns of the design.
    settings: of the experiment.
  """
  dtype = jnp.dtype(settings.dtype)
  design = np.random.default_rng(0).standard_normal(shape)
  design = jnp.asarray(design / np.sqrt(design.size), dtype)
  positions = jnp.ones((settings.num_chains, shape[1]), dtype)

  @jax.jit
  def loop(design, positions):
    return jax.lax.fori_loop(
      0, 100, lambda _, x: (x @ design.T) @ design, positions
    )

  seconds, _ = timed(lambda: loop(design, positions), settings.repeats)
  flops = 4 * design.size * settings.num_chains * 100
  return {
    "shape": list(shape),
    "gradients_per_second": 100 * settings.num_chains / seconds,
    "flops_per_second": flops / seconds,
  }


def time_gradient(problem, settings: Settings) -> dict:
  """Log-density and gradient of all chains."""
  positions = problem.start(jax.random.key(0), settings.num_chains)
  both = jax.vmap(jax.value_and_grad(problem.target.logdensity_fn))

  def one(_, carry):
    x, total = carry
    value, grad = both(x)
    return x + 1e-6 * grad, total + value

  @jax.jit
  def loop(x):
    return jax.lax.fori_loop(0, 100, one, (x, x[:, 0]))

  seconds, _ = timed(lambda: loop(positions), settings.repeats)
  return {"gradients_per_second": 100 * settings.num_chains / seconds}


def ours(problem, settings: Settings, acceptance: float):
  """GI-MALA alone, then with control variates for x and x^2."""
  keys = jax.random.split(jax.random.key(settings.seed), 2)
  state = jax.vmap(problem.init)(problem.start(keys[0], settings.num_chains))
  warm = mcmc.adaptation.adapt_step_size(
    keys[1],
    problem.step,
    state,
    settings.warm_up,
    rest=problem.rest,
    start=0.5,
    target_acceptance=acceptance,
  )
  arguments = dict(
    parameters=(warm.step_size, *problem.rest), batch_size=settings.batch_size
  )

  def run(**more):
    return mcmc.run_chains(
      warm.rng_keys,
      problem.step,
      warm.state,
      settings.num_steps,
      **arguments,
      **more,
    )

  common = {"acceptance": acceptance, "step_size": float(warm.step_size)}
  steps = settings.num_chains * settings.num_steps
  runs = {"": run}
  for name, functions in (
    ("_linear", (mcmc.poisson.Linear(),)),
    ("_linear_square", (mcmc.poisson.Linear(), mcmc.poisson.Square())),
  ):
    variates = mcmc.control_variates.poisson_terms(functions)
    more = dict(
      collector=variates.collector,
      carry=variates.init(warm.state.position, products_of_terms=False),
      collector_parameters=(problem.reference(warm.step_size),),
    )
    runs[name] = lambda more=more: run(**more)
  measured = timed_in_turn(list(runs.values()), settings.repeats)
  bare, _ = measured[0]
  yield {
    "kind": "gi_mala",
    **common,
    "seconds": bare,
    "gradients_per_second": steps / bare,
  }
  candidates = mcmc.control_variates.candidates(3)
  for name, (seconds, result) in list(zip(runs, measured, strict=True))[1:]:
    accumulator = jax.device_get(result.carry)
    start = time.perf_counter()
    choice = mcmc.choose(accumulator, candidates)
    host = time.perf_counter() - start
    estimate, dim = choice.estimate, problem.target.dim
    yield {
      "kind": f"gi_mala{name}",
      **common,
      "acceptance_rate": float(np.mean(result.stats.acceptance_rate)),
      "seconds": seconds,
      "host_seconds": host,
      "gradients_per_second": steps / seconds,
      "cost_of_control_variates": seconds / bare - 1,
      "min_ess_per_second": float(np.min(estimate.ess[:dim]) / seconds),
      "median_ess_per_second": float(np.median(estimate.ess[:dim]) / seconds),
      "plain_min_ess_per_second": float(
        np.min(estimate.plain_ess[:dim]) / bare
      ),
      "factors": estimate.factor[:dim].tolist(),
      "ess_per_second": (estimate.ess[:dim] / seconds).tolist(),
      "mean": estimate.mean[:dim].tolist(),
      "mcse": estimate.mcse[:dim].tolist(),
    }


def nuts(problem, settings: Settings) -> dict:
  """NUTS on the same number of chains, whitened like ours."""
  sampler = mcmc_peers.make("nuts", problem)
  keys = jax.random.split(jax.random.key(settings.seed + 1), 2)
  state = jax.vmap(sampler.init)(problem.start(keys[0], settings.num_chains))
  warm = mcmc.adaptation.adapt_step_size(
    keys[1],
    sampler.step,
    state,
    settings.nuts_steps,
    start=0.5,
    target_acceptance=sampler.acceptance,
  )

  def trace(state, info):
    return sampler.position(state), sampler.gradients(info)

  def run():
    return mcmc.run_chains(
      warm.rng_keys,
      sampler.step,
      warm.state,
      settings.nuts_steps,
      parameters=(warm.step_size,),
      batch_size=settings.nuts_steps,
      trace=trace,
    )

  seconds, result = timed(run, settings.repeats)
  draws, gradients = map(np.asarray, result.trace)
  means = draws.astype(np.float64).mean(0)
  error = means.std(0, ddof=1) / np.sqrt(settings.num_chains)
  ess = draws.reshape(-1, problem.target.dim).var(0) / error**2
  return {
    "step_size": float(warm.step_size),
    "seconds": seconds,
    "gradients_per_second": float(gradients.sum() / seconds),
    "gradients_per_step": float(gradients.mean()),
    "min_ess_per_second": float(ess.min() / seconds),
    "median_ess_per_second": float(np.median(ess) / seconds),
    "ess_per_second": (ess / seconds).tolist(),
    "mean": means.mean(0).tolist(),
    "mcse": error.tolist(),
  }
