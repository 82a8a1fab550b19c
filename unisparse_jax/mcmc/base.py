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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import flatten_util
from jaxtyping import Array, Bool, Float, Int

from unisparse_jax.mcmc import checks

# Random numbers held at once where they are drawn ahead, and steps in one body
# of the loop there, which spares loop iterations.
_NUMBERS_AHEAD = 2**25
_UNROLL_AHEAD = 5


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


@dataclasses.dataclass(frozen=True)
class TwoPhase:
  """A kernel or a step whose random numbers do not depend on the state.

  Called like any kernel, it draws and moves. `run_chains` may also draw for
  many steps at once, which saves thousands of chains on a GPU most of the
  kernel launches of a step.

  Attributes:
    draw: (rng_key, state, *parameters) -> noise; of the state it sees shapes
      and dtypes alone.
    move: (noise, state, *arguments) -> (state, info).
    num_bound: arguments of `move` before the parameters: 1 for a kernel, which
      takes its log-density first; 0 for a step.
  """

  draw: Callable
  move: Callable
  num_bound: int = 1

  def __call__(self, rng_key, state, *arguments):
    noise = self.draw(rng_key, state, *arguments[self.num_bound :])
    return self.move(noise, state, *arguments)


@functools.lru_cache(maxsize=256)
def bind(kernel: Callable, logdensity_fn: Callable) -> Callable:
  """`kernel` with its log-density: step(rng_key, state, *parameters).

  The same two functions give the same step, so a jitted loop that takes the
  step as a static argument is compiled once.
  """
  if isinstance(kernel, TwoPhase):

    def move(noise, state, *parameters):
      return kernel.move(noise, state, logdensity_fn, *parameters)

    return TwoPhase(kernel.draw, move, num_bound=0)

  def step(rng_key, state, *parameters):
    return kernel(rng_key, state, logdensity_fn, *parameters)

  return step


class Collector(NamedTuple):
  """What the loop computes from the steps of one chain, without storing them.

  Attributes:
    update: (carry, state, info, *parameters) -> carry, after every step.
    flush: carry -> carry, after every batch of steps.
  """

  update: Callable
  flush: Callable


class RunStats(NamedTuple):
  """Sums over the steps of each chain, [num_chains].

  Attributes:
    num_steps: steps taken.
    acceptance_rate: mean acceptance probability.
    num_accepted: steps whose proposal was taken.
    num_nonfinite: proposals rejected because their log-density or ratio was
      not finite.
    max_abs_log_ratio: largest |log_ratio| among the finite ones.
  """

  num_steps: Int[Array, " num_chains"]
  acceptance_rate: Float[Array, " num_chains"]
  num_accepted: Int[Array, " num_chains"]
  num_nonfinite: Int[Array, " num_chains"]
  max_abs_log_ratio: Float[Array, " num_chains"]


class Run(NamedTuple):
  """Result of `run_chains`.

  Attributes:
    state: states after the last step, leaves [num_chains, ...].
    rng_keys: [num_chains]; passing them on continues the same run.
    stats: what the steps did.
    carry: of the collector, leaves [num_chains, ...]; None without one.
    trace: outputs of `trace`, leaves [num_steps, num_chains, ...]; None
      without one.
  """

  state: Any
  rng_keys: Any
  stats: RunStats
  carry: Any
  trace: Any


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
      batch_size; the numbers are the same. Default 1 on a CPU, where it gains
      nothing; elsewhere the most for which 2^25 of them are held.

  Returns:
    The run.

  Raises:
    ValueError: no chain, or steps that are no multiple of batch_size, or a
      batch_size that is none of draw_ahead.
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
  rng_keys = chain_keys(rng_key, num_chains)
  num_batches = num_steps // batch_size
  if draw_ahead is None:
    draw_ahead = _draws_that_fit(step, state, batch_size)
  checks.check_positive_int("draw_ahead", draw_ahead)
  checks.require(
    batch_size % draw_ahead == 0,
    "draw_ahead",
    "divide batch_size",
    draw_ahead,
    f"a divisor of {batch_size}",
  )
  if trace is None:
    loop, batches = _run_untraced, jnp.int32(num_batches)
  else:
    loop, batches = _run_traced, num_batches
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


def _draws_that_fit(step, state, batch_size):
  if jax.default_backend() == "cpu" or not isinstance(step, TwoPhase):
    return 1
  numbers = sum(jnp.size(x) for x in jax.tree.leaves(state))
  most = max(1, min(batch_size, _NUMBERS_AHEAD // max(numbers, 1)))
  return max(n for n in range(1, most + 1) if batch_size % n == 0)


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


def _one_step(step, collector, trace, parameters, collector_parameters):
  """(keys or noise, state, stats, carry) -> state after a step, and the rest.

  Of every chain; `step` takes the first as its first argument.
  """

  def one_chain(source, state, stats, carry):
    state, info = step(source, state, *parameters)
    stats = _update_stats(stats, info)
    if collector is not None:
      carry = collector.update(carry, state, info, *collector_parameters)
    kept = None if trace is None else trace(state, info)
    return (state, stats, carry), kept

  return jax.vmap(one_chain)


def _one_batch(make_step, step, parameters, collector, batch_size, draw_ahead):
  split = jax.vmap(jax.random.split)

  def next_keys(rng_keys, _=None):
    pairs = split(rng_keys)
    return pairs[:, 0], pairs[:, 1]

  def from_keys(loop_carry, _):
    rng_keys, *rest = loop_carry
    rng_keys, step_keys = next_keys(rng_keys)
    rest, kept = make_step(step)(step_keys, *rest)
    return (rng_keys, *rest), kept

  def from_noise(loop_carry, _):
    rng_keys, *rest = loop_carry
    rng_keys, step_keys = jax.lax.scan(
      next_keys, rng_keys, None, length=draw_ahead, unroll=_UNROLL_AHEAD
    )

    def draw(key, state):
      return step.draw(key, state, *parameters)

    noise = jax.vmap(jax.vmap(draw), in_axes=(0, None))(step_keys, rest[0])
    move = make_step(step.move)
    rest, kept = jax.lax.scan(
      lambda c, n: move(n, *c), tuple(rest), noise, unroll=_UNROLL_AHEAD
    )
    return (rng_keys, *rest), kept

  def one_batch(loop_carry, _=None):
    if draw_ahead > 1 and isinstance(step, TwoPhase):
      loop_carry, kept = jax.lax.scan(
        from_noise, loop_carry, None, length=batch_size // draw_ahead
      )
      # [parts, draw_ahead, ...] -> [batch_size, ...]
      kept = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)
    else:
      loop_carry, kept = jax.lax.scan(
        from_keys, loop_carry, None, length=batch_size
      )
    if collector is not None:
      *rest, carry = loop_carry
      loop_carry = (*rest, jax.vmap(collector.flush)(carry))
    return loop_carry, kept

  return one_batch


def _run(loop, rng_keys, step, state, parameters, collector, carry, more):
  collector_parameters, batch_size, trace, draw_ahead = more

  def make_step(step):
    return _one_step(step, collector, trace, parameters, collector_parameters)

  one_batch = _one_batch(
    make_step, step, parameters, collector, batch_size, draw_ahead
  )
  stats = jax.vmap(lambda _: _empty_stats())(rng_keys)
  start = (rng_keys, state, stats, carry)
  (rng_keys, state, stats, carry), kept = loop(one_batch, start)
  mean = stats.acceptance_rate / stats.num_steps.astype(jnp.float32)
  stats = stats._replace(acceptance_rate=mean)
  return Run(state, rng_keys, stats, carry, kept)


@functools.partial(jax.jit, static_argnums=(1, 5, 8, 9, 10))
def _run_untraced(
  rng_keys, step, state, num_batches, parameters, collector, carry, *more
):
  def loop(one_batch, start):
    def body(_, loop_carry):
      return one_batch(loop_carry)[0]

    return jax.lax.fori_loop(0, num_batches, body, start), None

  return _run(loop, rng_keys, step, state, parameters, collector, carry, more)


@functools.partial(jax.jit, static_argnums=(1, 3, 5, 8, 9, 10))
def _run_traced(
  rng_keys, step, state, num_batches, parameters, collector, carry, *more
):
  def loop(one_batch, start):
    end, kept = jax.lax.scan(one_batch, start, None, length=num_batches)
    return end, jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:]), kept
    )  # [num_batches, batch_size, ...] -> [num_steps, ...]

  return _run(loop, rng_keys, step, state, parameters, collector, carry, more)


def _empty_stats() -> RunStats:
  zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
  return RunStats(none, zero, none, none, zero)


def _update_stats(stats: RunStats, info: Any) -> RunStats:
  # Samplers of other libraries lack some of the fields.
  acceptance_rate = getattr(info, "acceptance_rate", jnp.float32(jnp.nan))
  acceptance_rate = acceptance_rate.astype(jnp.float32)
  is_accepted = getattr(info, "is_accepted", jnp.bool_(False))
  log_ratio = getattr(info, "log_ratio", None)
  is_finite, size = jnp.bool_(True), jnp.float32(0)
  if log_ratio is not None:
    is_finite = log_ratio > -jnp.inf
    size = jnp.abs(log_ratio).astype(jnp.float32)
    size = jnp.where(jnp.isfinite(size), size, 0)
  return RunStats(
    stats.num_steps + 1,
    stats.acceptance_rate + acceptance_rate,
    stats.num_accepted + is_accepted.astype(jnp.int32),
    stats.num_nonfinite + (~is_finite).astype(jnp.int32),
    jnp.maximum(stats.max_abs_log_ratio, size),
  )
