# SPDX-License-Identifier: Apache-2.0
"""The compiled loop over steps of `vmap` over chains; see `base.run_chains`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Random numbers held at once where they are drawn ahead: on a CPU as many as
# its cache holds. (200 chains of 11 coefficients: 28% less time for a step.)
_NUMBERS_AHEAD = {"cpu": 2**18}
_NUMBERS_AHEAD_ELSEWHERE = 2**25
# Steps in one body of the loop over what was drawn ahead: sums of a collector
# are read and written once a body, and the longer body takes longer to compile.
# (CPU, 100 chains of 31 coefficients, float64: control variates cost 2 to 4% of
# a step in place of 3 to 6%, with squares 5 to 7% in place of 7 to 11%; bodies
# of 1, 4 and 5 steps were no better: with squares 15, 12 to 20 and 16 us a step
# against 12 to 17.)
UNROLL_AHEAD = {"cpu": 2}
UNROLL_AHEAD_ELSEWHERE = 5


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
    check: see `Kernel`.
  """

  draw: Callable
  move: Callable
  num_bound: int = 1
  check: Callable | None = None

  def __call__(self, rng_key, state, *arguments):
    noise = self.draw(rng_key, state, *arguments[self.num_bound :])
    return self.move(noise, state, *arguments)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel or a step with a check of its parameters.

  Attributes:
    function: what it does when called.
    check: (state, *parameters), called by `run_chains` before anything is
      compiled; raises ValueError.
  """

  function: Callable
  check: Callable

  def __call__(self, rng_key, state, *arguments, **more):
    return self.function(rng_key, state, *arguments, **more)


class Collector(NamedTuple):
  """What the loop computes from the steps of one chain, without storing them.

  Attributes:
    update: (carry, state, info, *parameters) -> carry, after every step.
    flush: carry -> carry, after every batch of steps.
    open: (carry, batch_size, *parameters) -> what `update` takes and gives
      during a batch, and `flush` turns into a carry; None where that is the
      carry itself.
  """

  update: Callable
  flush: Callable
  open: Callable | None = None


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


def draws_that_fit(step: Callable, state: Any, batch_size: int) -> int:
  """The most steps of a batch to draw for at once; 1 where a step cannot."""
  if not isinstance(step, TwoPhase):
    return 1
  numbers = sum(jnp.size(x) for x in jax.tree.leaves(state))
  limit = _NUMBERS_AHEAD.get(jax.default_backend(), _NUMBERS_AHEAD_ELSEWHERE)
  most = max(1, min(batch_size, limit // max(numbers, 1)))
  return max(n for n in range(1, most + 1) if batch_size % n == 0)


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


def _one_batch(make_step, step, parameters, collected, batch_size, draw_ahead):
  collector, collector_parameters = collected
  split = jax.vmap(jax.random.split)
  unroll = UNROLL_AHEAD.get(jax.default_backend(), UNROLL_AHEAD_ELSEWHERE)

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
      next_keys, rng_keys, None, length=draw_ahead, unroll=unroll
    )

    def draw(key, state):
      return step.draw(key, state, *parameters)

    noise = jax.vmap(jax.vmap(draw), in_axes=(0, None))(step_keys, rest[0])
    move = make_step(step.move)
    rest, kept = jax.lax.scan(
      lambda c, n: move(n, *c), tuple(rest), noise, unroll=unroll
    )
    return (rng_keys, *rest), kept

  def open_one(carry):
    return collector.open(carry, batch_size, *collector_parameters)

  def one_batch(loop_carry, _=None):
    if collector is not None and collector.open is not None:
      *rest, carry = loop_carry
      loop_carry = (*rest, jax.vmap(open_one)(carry))
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


def _run(
  loop, rng_keys, step, state, num_batches, parameters, collector, carry, more
):
  collector_parameters, batch_size, trace, draw_ahead = more

  def make_step(step):
    return _one_step(step, collector, trace, parameters, collector_parameters)

  one_batch = _one_batch(
    make_step,
    step,
    parameters,
    (collector, collector_parameters),
    batch_size,
    draw_ahead,
  )
  stats = jax.vmap(lambda _: _empty_stats())(rng_keys)
  start = (rng_keys, state, stats, carry)
  (rng_keys, state, stats, carry), kept = loop(one_batch, start)
  # Known without counting: one array less in every step.
  steps = jnp.full_like(stats.num_steps, batch_size) * num_batches
  mean = stats.acceptance_rate / steps.astype(jnp.float32)
  stats = stats._replace(num_steps=steps, acceptance_rate=mean)
  return Run(state, rng_keys, stats, carry, kept)


@functools.partial(jax.jit, static_argnums=(1, 5, 8, 9, 10))
def run_untraced(
  rng_keys, step, state, num_batches, parameters, collector, carry, *more
):
  def loop(one_batch, start):
    def body(_, loop_carry):
      return one_batch(loop_carry)[0]

    return jax.lax.fori_loop(0, num_batches, body, start), None

  return _run(
    loop, rng_keys, step, state, num_batches, parameters, collector, carry, more
  )


@functools.partial(jax.jit, static_argnums=(1, 3, 5, 8, 9, 10))
def run_traced(
  rng_keys, step, state, num_batches, parameters, collector, carry, *more
):
  def loop(one_batch, start):
    end, kept = jax.lax.scan(one_batch, start, None, length=num_batches)
    return end, jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:]), kept
    )  # [num_batches, batch_size, ...] -> [num_steps, ...]

  return _run(
    loop, rng_keys, step, state, num_batches, parameters, collector, carry, more
  )


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
    stats.num_steps,
    stats.acceptance_rate + acceptance_rate,
    stats.num_accepted + is_accepted.astype(jnp.int32),
    stats.num_nonfinite + (~is_finite).astype(jnp.int32),
    jnp.maximum(stats.max_abs_log_ratio, size),
  )
