# SPDX-License-Identifier: Apache-2.0
"""Timings of thousands of chains at once; see `sampler_throughput`."""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from experiments.sampling import mcmc_peers, mcmc_problems, mcmc_runs
from pallas_kernels.logistic_likelihood import api, triton
from unisparse_jax import mcmc

# Of a gradient over the largest of its coordinates, to count as one in float32;
# a single product of TensorFloat-32 misses it.
_LARGEST_ERROR = 1e-5


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
    likelihoods: whose gradients are timed: "own" for the target's, else an
      implementation of `pallas_kernels.logistic_likelihood`.
    tiles: of its kernel, also timed: sizes as its `TILE`, then one of its
      `PRODUCTS`.
    sampled: likelihoods with which our sampler is timed; "fastest" for that
      of the fastest gradient with the digits of float32.
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
  likelihoods: tuple[str, ...] = ("own",)
  tiles: tuple[tuple[int | str, ...], ...] = ()
  sampled: tuple[str, ...] = ("own",)
  nuts_steps: int = 50
  repeats: int = 3
  dtype: str = "float32"
  precision: str = "highest"


def with_likelihood(own: mcmc_problems.Problem, likelihood: str):
  """The posterior with one way to compute its likelihood.

  Args:
    own: with the target's own.
    likelihood: one of its likelihoods, or "triton:64:64:4:2:tf32x3", a tile.
  """
  name, *tile = likelihood.split(":")
  if tile:
    fn = _tiled(tuple(map(int, tile[:-1])), tile[-1])
  else:
    if name == "own":
      return own
    fn = _named(name)
  return mcmc_problems.with_likelihood(own, fn)


@functools.cache
def _named(name):
  return functools.partial(api.log_likelihood, implementation=name)


@functools.cache
def _tiled(tile, products):
  batched = functools.partial(
    triton.logistic_likelihood, tile=tile, products=products
  )
  return api.differentiable(batched)


def measure(settings: Settings):
  """Yields one measurement after another."""
  features, _ = mcmc_problems.labelled(settings.target)
  own = mcmc_problems.make(settings.target, jnp.dtype(settings.dtype))
  shape = (len(features), own.target.dim)
  yield {"kind": "products", **time_products(shape, settings)}
  padded = (-(-shape[0] // 64) * 64, -(-shape[1] // 32) * 32)
  yield {"kind": "products_padded", **time_products(padded, settings)}
  fastest, best = "own", 0.0
  for found in time_gradients(own, settings):
    speed = found.get("gradients_per_second", 0.0)
    if found.get("max_error_over_largest", 1.0) < _LARGEST_ERROR:
      if speed > best:
        fastest, best = found["likelihood"], speed
    yield {"kind": "gradient", **found}
  names = [fastest if x == "fastest" else x for x in settings.sampled]
  problems = {x: with_likelihood(own, x) for x in dict.fromkeys(names)}
  for acceptance in settings.acceptances:
    yield from ours(problems, settings, acceptance)
  if settings.nuts_steps:
    yield {"kind": "nuts", **nuts(list(problems.values())[-1], settings)}


def called(fns) -> list[Exception | None]:
  """Calls each function once, which compiles: side by side, to save time.

  Returns:
    What each raised, if anything.
  """

  def call(fn):
    try:
      jax.block_until_ready(fn())
    except Exception as error:  # Of any compiler: the others go on.
      return error
    return None

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(call, fns))


def timed(fn, repeats: int):
  """(seconds, last result) of fn() after a first call; see `timed_in_turn`."""
  jax.block_until_ready(fn())
  ((seconds, result),) = timed_in_turn([fn], repeats)
  return seconds, result


def timed_in_turn(fns, repeats: int):
  """(seconds, last result) of each function, all of them called before.

  They take turns, so that what else the machine does falls on all alike. The
  median of the wall clock on an accelerator. On a CPU, the least time of all
  threads of this process, which other work hardly moves: with one thread
  (XLA_FLAGS=--xla_cpu_multi_thread_eigen=false) it is the wall clock of a
  machine that does nothing else.
  """
  results = [None] * len(fns)
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


def time_gradients(
  own: mcmc_problems.Problem, settings: Settings
) -> Iterator[dict[str, Any]]:
  """Log-density and gradient of all chains, by every likelihood in turn.

  Yields one record each; one that the machine cannot compile says why.
  """
  tiles = ["triton:" + ":".join(map(str, tile)) for tile in settings.tiles]
  names = [*settings.likelihoods, *tiles]
  problems = [with_likelihood(own, name) for name in names]
  exact = _exact_gradients(own)
  positions = problems[0].start(jax.random.key(0), settings.num_chains)
  loops = [
    functools.partial(_gradient_loop, p.target.logdensity_fn, positions)
    for p in problems
  ]
  # The first alone: a GPU tries out algorithms for products that others share.
  refusals = called(loops[:1]) + called(loops[1:])
  ready = [i for i, refusal in enumerate(refusals) if refusal is None]
  measured = timed_in_turn([loops[i] for i in ready], settings.repeats)
  seconds = dict(zip(ready, [s for s, _ in measured], strict=True))
  for i, name in enumerate(names):
    if refusals[i] is not None:
      yield {"likelihood": name, "refused": str(refusals[i])[-500:]}
      continue
    logdensity_fn = problems[i].target.logdensity_fn
    both = jax.jit(jax.vmap(jax.value_and_grad(logdensity_fn)))
    _, grads = both(jnp.asarray(exact[0], positions.dtype))
    error = np.abs(np.asarray(grads, np.float64) - exact[1]).max()
    yield {
      "likelihood": name,
      "gradients_per_second": 100 * settings.num_chains / seconds[i],
      "max_error_over_largest": float(error / np.abs(exact[1]).max()),
    }


@functools.partial(jax.jit, static_argnums=0)
def _gradient_loop(logdensity_fn, positions):
  both = jax.vmap(jax.value_and_grad(logdensity_fn))

  def one(_, carry):
    x, total = carry
    value, grad = both(x)
    return x + 1e-6 * grad, total + value

  start = (positions, positions[:, 0])
  return jax.lax.fori_loop(0, 100, one, start)


def _exact_gradients(own: mcmc_problems.Problem):
  """64 positions near the posterior and gradients there, in float64."""
  features, labels = mcmc_problems.labelled(own.name)
  scale = features.std(0)
  columns = (features - features.mean(0))[:, scale > 0] / scale[scale > 0]
  columns = np.concatenate([np.ones((len(columns), 1)), columns], axis=1)
  signed = columns * (2.0 * labels - 1)[:, None]
  positions = own.start(jax.random.key(1), 64)
  x = np.asarray(positions, np.float64)
  slopes = scipy.special.expit(-x @ signed.T)
  return x, slopes @ signed - x


def ours(problems: dict, settings: Settings, acceptance: float):
  """GI-MALA alone, then with control variates for x and x^2.

  Args:
    problems: one posterior, by how its likelihood is computed; all runs take
      turns.
    settings: of the experiment.
    acceptance: that the step size is tuned to, with the first of them.
  """
  problem = next(iter(problems.values()))
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
  families = (mcmc.poisson.Linear(), mcmc.poisson.Square())
  collected = {"": {}}
  for name, functions in (
    ("_linear", families[:1]),
    ("_linear_square", families),
  ):
    variates = mcmc.control_variates.poisson_terms(functions)
    collected[name] = dict(
      collector=variates.collector,
      carry=variates.init(warm.state.position),
      collector_parameters=(problem.reference(warm.step_size),),
    )

  def run(step, more):
    return mcmc.run_chains(
      warm.rng_keys,
      step,
      warm.state,
      settings.num_steps,
      parameters=(warm.step_size, *problem.rest),
      batch_size=settings.batch_size,
      **more,
    )

  runs = {
    (likelihood, name): functools.partial(run, problem.step, more)
    for likelihood, problem in problems.items()
    for name, more in collected.items()
  }
  for refusal in called(list(runs.values())):
    if refusal is not None:
      raise refusal
  measured = timed_in_turn(list(runs.values()), settings.repeats)
  steps = settings.num_chains * settings.num_steps
  for (likelihood, name), (seconds, result) in zip(runs, measured, strict=True):
    common = {
      "kind": f"gi_mala{name}",
      "likelihood": likelihood,
      "acceptance": acceptance,
      "step_size": float(warm.step_size),
      "seconds": seconds,
      "gradients_per_second": steps / seconds,
    }
    if not name:
      bare = seconds
      yield common
      continue
    yield common | {
      "acceptance_rate": float(np.mean(result.stats.acceptance_rate)),
      "cost_of_control_variates": seconds / bare - 1,
      **estimated(result.carry, problem.target.dim, seconds, bare),
    }


def estimated(carry, dim: int, seconds: float, bare: float) -> dict:
  """Effective sizes a second of the controlled means, and the means."""
  accumulator = jax.device_get(carry)
  start = time.perf_counter()
  choice = mcmc.choose(accumulator, mcmc.control_variates.candidates(3))
  host = time.perf_counter() - start
  estimate = choice.estimate
  return {
    "host_seconds": host,
    "min_ess_per_second": float(np.min(estimate.ess[:dim]) / seconds),
    "median_ess_per_second": float(np.median(estimate.ess[:dim]) / seconds),
    "plain_min_ess_per_second": float(np.min(estimate.plain_ess[:dim]) / bare),
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
