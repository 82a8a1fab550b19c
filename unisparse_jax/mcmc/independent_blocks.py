# SPDX-License-Identifier: Apache-2.0
"""Many independent-Metropolis chains, with proposals drawn in blocks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unisparse_jax.mcmc import accumulators, base, checks, expectations
from unisparse_jax.mcmc import independent_metropolis as sampler

# Accept steps of one fused loop body on a GPU, where a step of a thousand
# chains is less work than the start of a loop iteration.
_GPU_UNROLL = 16


def init_chains(
  rng_key: Any,
  logdensity_fn: Callable,
  proposal: Any,
  num_chains: int,
  *,
  candidates: int = 32,
  unravel: Callable | None = None,
) -> sampler.IMState:
  """Starts chains close to the target: each at a resampled draw of q.

  Each chain draws `candidates` points and keeps one with probability
  proportional to its weight, so that no chain starts where it would stick.

  Args:
    rng_key: one key.
    logdensity_fn: pytree -> unnormalised log-density.
    proposal: over raveled positions.
    num_chains: chains.
    candidates: draws for each chain.
    unravel: from vector to pytree; default the vector itself.

  Returns:
    States, leaves [num_chains, ...].

  Raises:
    ValueError: a number is not positive.
    TypeError: the proposal has no log-density.
  """
  sampler.check_proposal(proposal)
  checks.check_positive_int("num_chains", num_chains)
  checks.check_positive_int("candidates", candidates)
  unravel = _identity if unravel is None else unravel
  return _init_chains(
    jax.random.split(rng_key, num_chains),
    logdensity_fn,
    proposal,
    candidates,
    unravel,
  )


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _init_chains(rng_keys, logdensity_fn, proposal, candidates, unravel):
  def one_chain(key):
    key_draw, key_choice = jax.random.split(key)
    keys = jax.random.split(key_draw, candidates)
    drawn = jax.vmap(proposal.sample)(keys)
    states = jax.vmap(
      lambda x: sampler.init(unravel(x), logdensity_fn, proposal)
    )(drawn)
    log_weight = jnp.where(
      jnp.isfinite(states.logdensity), states.log_weight, -jnp.inf
    )
    chosen = jax.random.categorical(key_choice, log_weight)
    return jax.tree.map(lambda x: x[chosen], states)

  return jax.vmap(one_chain)(rng_keys)


def run_chains(
  rng_key: Any,
  logdensity_fn: Callable,
  proposal: Any,
  state: sampler.IMState,
  num_steps: int,
  *,
  functional: Any = None,
  expectation: Float[Array, " num_functions"] | None = None,
  num_terms: int = sampler.NUM_TERMS,
  accumulator: accumulators.Accumulator | None = None,
  block_size: int = 100,
) -> base.Run:
  """Many chains at once; proposals are drawn and weighed in blocks.

  The law is that of `base.run_chains` with this kernel and `collector`. But no
  proposal depends on a chain: those of a block of steps are drawn and evaluated
  by all chains together, as matrix products, and only the accept steps, a few
  operations on log-weights, run one after another.

  Args:
    rng_key: one key, or one for each chain as `Run.rng_keys` gives them.
    logdensity_fn: pytree -> unnormalised log-density.
    proposal: over raveled positions; a pytree, so that another fit of the same
      shape does not compile again.
    state: leaves [num_chains, ...], as `init_chains` gives them.
    num_steps: steps of each chain; a multiple of block_size.
    functional: F to estimate, a pytree; see `expectations`. Default the
      coordinates.
    expectation: E_q F, [num_functions]; default its closed form.
    num_terms: control-variate terms to keep: all, or 2 for H1 and H2 alone.
    accumulator: to go on with, of the same functional and the same proposal.
    block_size: steps in a block; also the batches of the accumulator. Memory
      is about num_chains * block_size * (dim + (2 + num_terms) num_functions)
      numbers.

  Returns:
    The run; its carry is the accumulator, flushed.

  Raises:
    ValueError: no chain, steps that are no multiple of block_size, or no known
      E_q F.
    TypeError: the proposal has no log-density.
  """
  sampler.check_proposal(proposal)
  checks.check_positive_int("num_steps", num_steps)
  checks.check_positive_int("block_size", block_size)
  checks.require(
    num_steps % block_size == 0,
    "num_steps",
    "be a multiple of block_size",
    num_steps,
    f"num_steps % {block_size} == 0",
  )
  num_chains = base.check_num_chains(state)
  rng_keys = base.chain_keys(rng_key, num_chains)
  checks.require(
    num_terms in (2, sampler.NUM_TERMS),
    "num_terms",
    f"be 2 or {sampler.NUM_TERMS}",
    num_terms,
  )
  dtype = state.log_weight.dtype
  if functional is None:
    first = jax.tree.map(lambda x: x[0], state.position)
    functional = expectations.coordinates(base.ravel(first)[0].shape[0], dtype)
  if expectation is None:
    expectation = expectations.expectation(functional, proposal)
  if accumulator is None:
    centres = jnp.broadcast_to(expectation, (num_chains, *expectation.shape))
    accumulator = accumulators.init_chains(centres, num_terms)
  # Weights are unnormalised; see `independent_metropolis.terms`.
  finite = jnp.isfinite(state.log_weight)
  reference = jnp.mean(state.log_weight, where=finite)
  num_blocks = jnp.int32(num_steps // block_size)
  return _run_blocks(
    rng_keys,
    logdensity_fn,
    proposal,
    state,
    num_blocks,
    functional,
    expectation,
    jnp.where(jnp.any(finite), reference, 0),
    accumulator,
    block_size,
  )


class Decisions(NamedTuple):
  """What happened to a block of proposals of one or many chains.

  Attributes:
    kept: number of the proposal that is the state before each step, -1 for the
      state before the block.
    acceptance_rate: acceptance probabilities.
    log_ratio: as `IMInfo` has it.
    is_accepted: coins.
    log_weight: of the states before each step.
    last: `kept` after the last step.
  """

  kept: Int[Array, "block ..."]
  acceptance_rate: Float[Array, "block ..."]
  log_ratio: Float[Array, "block ..."]
  is_accepted: Bool[Array, "block ..."]
  log_weight: Float[Array, "block ..."]
  last: Int[Array, "..."]


def decide(
  log_weight: Float[Array, "..."],
  proposed: Float[Array, "block ..."],
  is_valid: Bool[Array, "block ..."],
  uniform: Float[Array, "block ..."],
) -> Decisions:
  """Accept steps of a block, one after another: `base.accept_or_reject` again,
  on log-weights alone.

  Args:
    log_weight: of the states before the block.
    proposed: log-weights of the proposals.
    is_valid: whether a proposal's target density is finite.
    uniform: in [0, 1).
  """

  def one_step(carry, inputs):
    current, kept = carry
    number, weight, valid, coin = inputs
    log_ratio = weight - current
    valid = valid & ~jnp.isnan(log_ratio)
    log_ratio = jnp.where(valid, log_ratio, -jnp.inf)
    rate = jnp.exp(jnp.minimum(log_ratio, 0))
    accepted = coin < rate
    after = (
      jnp.where(accepted, weight, current),
      jnp.where(accepted, number, kept),
    )
    return after, (kept, rate, log_ratio, accepted, current)

  numbers = jnp.arange(proposed.shape[0], dtype=jnp.int32)
  start = (log_weight, jnp.full(log_weight.shape, -1, jnp.int32))
  (_, last), steps = jax.lax.scan(
    one_step,
    start,
    (numbers, proposed, is_valid, uniform),
    unroll=_GPU_UNROLL if jax.default_backend() == "gpu" else 1,
  )
  return Decisions(*steps, last)


@functools.partial(jax.jit, static_argnums=(1, 9))
def _run_blocks(
  rng_keys,
  logdensity_fn,
  proposal,
  state,
  num_blocks,
  functional,
  expectation,
  reference,
  accumulator,
  block_size,
):
  first = jax.tree.map(lambda x: x[0], state.position)
  _, unravel = base.ravel(first)
  ravel = jax.vmap(lambda position: base.ravel(position)[0])

  def per_draw(fn):
    return jax.vmap(jax.vmap(fn))

  def one_block(_, carry):
    rng_keys, vector, logdensity, log_weight, stats, accumulator = carry
    split = jax.vmap(lambda key: jax.random.split(key, block_size + 2))(
      rng_keys
    )
    uniform = jax.vmap(
      lambda key: jax.random.uniform(key, (block_size,), log_weight.dtype)
    )(split[:, 1])
    drawn = per_draw(proposal.sample)(split[:, 2:])  # [chains, block, dim]
    there = per_draw(lambda x: logdensity_fn(unravel(x)))(drawn)
    weights = there - per_draw(proposal.logdensity)(drawn)
    decisions = decide(log_weight, weights.T, jnp.isfinite(there).T, uniform.T)
    # F at the states before each step: each F is evaluated once.
    proposed = per_draw(functional)(drawn)
    before = jax.vmap(functional)(vector)
    value = _take(before, proposed, decisions.kept.T)
    rate = decisions.acceptance_rate.T[..., None]
    expected = jnp.broadcast_to(expectation, value.shape)
    levels = ()
    if accumulator.centre.shape[1] > 3:
      levels = (
        decisions.log_weight.T[..., None] - reference,
        weights[..., None] - reference,
      )
    control = sampler.control(value, proposed, expected, rate, *levels)
    accumulator = _add_block(accumulator, value, control)
    last = decisions.last[:, None]
    now = [
      _take(a, b, last)[:, 0]
      for a, b in ((vector, drawn), (logdensity, there), (log_weight, weights))
    ]
    stats = _add_stats(stats, decisions, block_size)
    return (split[:, 0], *now, stats, accumulator)

  stats = base.RunStats(
    *(
      jnp.zeros(rng_keys.shape[:1], dtype)
      for dtype in (jnp.int32, jnp.float32, jnp.int32, jnp.int32, jnp.float32)
    )
  )
  carry = (
    rng_keys,
    ravel(state.position),
    state.logdensity,
    state.log_weight,
    stats,
    accumulator,
  )
  carry = jax.lax.fori_loop(0, num_blocks, one_block, carry)
  rng_keys, vector, logdensity, log_weight, stats, accumulator = carry
  mean = stats.acceptance_rate / stats.num_steps.astype(jnp.float32)
  stats = stats._replace(acceptance_rate=mean)
  state = sampler.IMState(jax.vmap(unravel)(vector), logdensity, log_weight)
  return base.Run(state, rng_keys, stats, accumulator, None)


def _take(before, values, kept):
  """values[chain, kept], or before[chain] where kept is -1."""
  everything = jnp.concatenate([before[:, None], values], axis=1)
  index = (kept + 1).reshape(*kept.shape, *(1,) * (values.ndim - 2))
  return jnp.take_along_axis(everything, index, axis=1)


def _add_block(accumulator, value, control):
  """Adds [chains, block, functions] values and their terms as one batch."""
  rows = jnp.concatenate([value[None], control])  # [rows, chains, block, p]
  rows = jnp.moveaxis(rows, 0, 2).astype(accumulators.dtype())
  rows = rows - accumulator.centre[:, None]
  kept = rows[:, :, : accumulator.batch_products.shape[1]]
  # One fused pass; an einsum with two batch axes was 3.4 times slower on CPU.
  products = jnp.sum(kept[:, :, :, None] * kept[:, :, None], axis=1)
  accumulator = accumulator._replace(
    batch_count=accumulator.batch_count + value.shape[1],
    batch_sum=accumulator.batch_sum + jnp.sum(rows, axis=1),
    batch_products=accumulator.batch_products + products,
  )
  return jax.vmap(accumulators.flush)(accumulator)


def _add_stats(stats, decisions, block_size):
  is_finite = decisions.log_ratio > -jnp.inf
  size = jnp.abs(decisions.log_ratio)
  size = jnp.where(jnp.isfinite(size), size, 0).astype(jnp.float32)
  rate = decisions.acceptance_rate.astype(jnp.float32)

  def count(x):
    return jnp.sum(x, axis=0, dtype=jnp.int32)

  return base.RunStats(
    stats.num_steps + block_size,
    stats.acceptance_rate + jnp.sum(rate, axis=0),
    stats.num_accepted + count(decisions.is_accepted),
    stats.num_nonfinite + count(~is_finite),
    jnp.maximum(stats.max_abs_log_ratio, jnp.max(size, axis=0)),
  )


def _identity(position):
  return position
