# SPDX-License-Identifier: Apache-2.0
"""What a sampler is, the one accept/reject step, and the loop over chains.

Samplers follow the BlackJAX convention: a module holds `init`, `build_kernel`
and `as_top_level_api`, the last giving a `SamplingAlgorithm`. Two rules are
ours, because control variates need them:

- `Info` speaks of the step just taken: `position_prev` is the state before
  accept/reject, `proposal` the point that was drawn, accepted or not, and
  `acceptance_rate` the probability, not the coin.
- Everything that changes between two runs of one program (step size,
  preconditioner, parameters of the test functions) is an argument, so that one
  compiled program serves all of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import flatten_util
from jaxtyping import Array, Bool, Float

from unisparse_jax.mcmc import chain_loop, checks

# The loop's own types belong to the convention.
TwoPhase = chain_loop.TwoPhase
Kernel = chain_loop.Kernel
Collector = chain_loop.Collector
RunStats = chain_loop.RunStats
Run = chain_loop.Run


class Info(Protocol):
  """Fields that every sampler's Info has; vectors are raveled positions."""

  position_prev: Float[Array, " dim"]
  proposal: Float[Array, " dim"]
  acceptance_rate: Float[Array, ""]
  is_accepted: Bool[Array, ""]
  log_ratio: Float[Array, ""]


class SamplingAlgorithm(NamedTuple):
  """A sampler with all its arguments bound, as BlackJAX's runners take it.

  Attributes:
    init: (position, rng_key=None) -> state.
    step: (rng_key, state) -> (state, info).
  """

  init: Callable
  step: Callable


class Accepted(NamedTuple):
  """Result of `accept_or_reject`: the next state and what led to it."""

  state: Any
  acceptance_rate: Float[Array, ""]
  is_accepted: Bool[Array, ""]
  log_ratio: Float[Array, ""]


def accept_or_reject(
  rng_key: Any,
  log_ratio: Float[Array, ""],
  logdensity: Float[Array, ""],
  proposed: Any,
  current: Any,
) -> Accepted:
  """The Metropolis-Hastings decision, the same for every sampler.

  Args:
    rng_key: for the coin.
    log_ratio: log of pi(y) q(x|y) / (pi(x) q(y|x)), before min(0, .).
    logdensity: of the proposal. A proposal where it is not finite, or where
      the ratio is NaN, is rejected: probability 0, log_ratio -inf.
    proposed: state pytree at the proposal.
    current: state pytree of the same structure.

  Returns:
    The chosen state, the acceptance probability, the coin and the ratio.
  """
  uniform = jax.random.uniform(rng_key, dtype=log_ratio.dtype)
  return accept_by(uniform, log_ratio, logdensity, proposed, current)


def accept_by(
  uniform: Float[Array, ""],
  log_ratio: Float[Array, ""],
  logdensity: Float[Array, ""],
  proposed: Any,
  current: Any,
) -> Accepted:
  """`accept_or_reject` by a number drawn before, in [0, 1)."""
  is_valid = jnp.isfinite(logdensity) & ~jnp.isnan(log_ratio)
  log_ratio = jnp.where(is_valid, log_ratio, -jnp.inf)
  acceptance_rate = jnp.exp(jnp.minimum(log_ratio, 0))
  # uniform lies in [0, 1): a probability of 0 never accepts, of 1 always does.
  is_accepted = uniform < acceptance_rate
  state = jax.tree.map(
    lambda y, x: jnp.where(is_accepted, y, x), proposed, current
  )
  return Accepted(state, acceptance_rate, is_accepted, log_ratio)


def ravel(position: Any) -> tuple[Float[Array, " dim"], Callable]:
  """A position as one vector, and the way back.

  Raises:
    ValueError: the leaves are not all of one floating dtype.
  """
  leaves = jax.tree.leaves(position)
  dtypes = sorted({jnp.dtype(jnp.result_type(x)).name for x in leaves})
  ok = len(dtypes) == 1 and jnp.issubdtype(dtypes[0], jnp.floating)
  checks.require(ok, "position", "have leaves of one float dtype", dtypes)
  return flatten_util.ravel_pytree(position)


def value_and_grad(
  logdensity_fn: Callable, vector: Float[Array, " dim"], unravel: Callable
) -> tuple[Float[Array, ""], Float[Array, " dim"]]:
  """Log-density and its gradient at a raveled position."""
  return jax.value_and_grad(lambda v: logdensity_fn(unravel(v)))(vector)


@functools.lru_cache(maxsize=256)
def bind(kernel: Callable, logdensity_fn: Callable) -> Callable:
  """`kernel` with its log-density: step(rng_key, state, *parameters).

  The same two functions give the same step, so a jitted loop that takes the
  step as a static argument is compiled once.
  """
  if isinstance(kernel, TwoPhase):

    def move(noise, state, *parameters):
      return kernel.move(noise, state, logdensity_fn, *parameters)

    return TwoPhase(kernel.draw, move, num_bound=0, check=kernel.check)

  def step(rng_key, state, *parameters):
    return kernel(rng_key, state, logdensity_fn, *parameters)

  return Kernel(step, kernel.check) if isinstance(kernel, Kernel) else step


def check_parameters(step: Callable, state: Any, parameters: tuple):
  """Checks the parameters of a step, where it knows how.

  Args:
    step: as `run_chains` takes it.
    state: leaves [num_chains, ...].
    parameters: of the step.

  Raises:
    ValueError: a parameter that the step cannot use.
  """
  if isinstance(step, TwoPhase | Kernel) and step.check is not None:
    step.check(state, *parameters)


def dim_of_chains(state: Any) -> int:
  """Coordinates of one chain's position, of a state of many chains."""
  return sum(
    math.prod(jnp.shape(x)[1:]) for x in jax.tree.leaves(state.position)
  )


def run_chains(
  rng_key: Any,
  step: Callable,
  state: Any,
  num_steps: int,
  *,
  parameters: tuple = (),
  collector: Collector | None = None,
  carry: Any = None,
  collector_parameters: tuple = (),
  batch_size: int = 100,
  trace: Callable | None = None,
  draw_ahead: int | None = None,
) -> Run:
  """Steps of many chains at once: a loop over steps of `vmap` over chains.

  Compiled once for each (step, collector, trace, batch_size, shapes): neither
  num_steps (unless a trace is kept) nor any parameter's value compiles again.

  Args:
    rng_key: one key, or one for each chain as `Run.rng_keys` gives them.
    step: (rng_key, state, *parameters) -> (state, info); `bind(kernel,
      logdensity_fn)`, or `algorithm.step` of a `SamplingAlgorithm`.
    state: leaves [num_chains, ...], as `jax.vmap(init)` gives them.
    num_steps: steps of each chain; a multiple of batch_size.
    parameters: pytrees shared by all chains.
    collector: what to compute along the way.
    carry: its start, leaves [num_chains, ...].
    collector_parameters: pytrees shared by all chains.
    batch_size: steps between two flushes of the collector.
    trace: (state, info) -> pytree to store for every step, or None.
    draw_ahead: steps for which a `TwoPhase` step draws at once, a divisor of
      batch_size; the numbers are the same. Default the most for which 2^18
      of them are held on a CPU, 2^25 elsewhere.

  Returns:
    The run.

  Raises:
    ValueError: no chain, or steps that are no multiple of batch_size, or a
      batch_size that is none of draw_ahead, or parameters that a sampler of
      this package cannot use: step_size out of (0, 2), another size than that
      of the position.
  """
  checks.check_positive_int("num_steps", num_steps)
  checks.check_positive_int("batch_size", batch_size)
  checks.require(
    num_steps % batch_size == 0,
    "num_steps",
    "be a multiple of batch_size",
    num_steps,
    f"num_steps % {batch_size} == 0",
  )
  num_chains = check_num_chains(state)
  check_parameters(step, state, parameters)
  rng_keys = chain_keys(rng_key, num_chains)
  num_batches = num_steps // batch_size
  if draw_ahead is None:
    draw_ahead = chain_loop.draws_that_fit(step, state, batch_size)
  checks.check_positive_int("draw_ahead", draw_ahead)
  checks.require(
    batch_size % draw_ahead == 0,
    "draw_ahead",
    "divide batch_size",
    draw_ahead,
    f"a divisor of {batch_size}",
  )
  if trace is None:
    loop, batches = chain_loop.run_untraced, jnp.int32(num_batches)
  else:
    loop, batches = chain_loop.run_traced, num_batches
  return loop(
    rng_keys,
    step,
    state,
    batches,
    parameters,
    collector,
    carry,
    collector_parameters,
    batch_size,
    trace,
    draw_ahead,
  )


def check_num_chains(state: Any) -> int:
  """Number of chains of a batched state; ValueError where there is none."""
  sizes = {jnp.shape(x)[0] if jnp.ndim(x) else None for x in _leaves(state)}
  ok = len(sizes) == 1 and None not in sizes
  checks.require(
    ok,
    "state",
    "have one leading axis of chains in every leaf",
    sorted(map(str, sizes)),
    "the result of jax.vmap(init)(positions)",
  )
  (num_chains,) = sizes
  checks.check_positive_int("num_chains", num_chains)
  return num_chains


def chain_keys(rng_key: Any, num_chains: int) -> Any:
  """One key for each chain, from one key or from keys that are that already."""
  is_typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
  if rng_key.ndim == (0 if is_typed else 1):
    return jax.random.split(rng_key, num_chains)
  checks.require(
    rng_key.shape[0] == num_chains,
    "rng_key",
    "be one key or one for each chain",
    rng_key.shape,
    f"shape () or ({num_chains},)",
  )
  return rng_key


def _leaves(tree):
  leaves = jax.tree.leaves(tree)
  checks.require(bool(leaves), "state", "have leaves", tree)
  return leaves
