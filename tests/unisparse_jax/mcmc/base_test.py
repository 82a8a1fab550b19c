# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax.mcmc import base, chain_loop, gi_mala, preconditioner


class WalkState(NamedTuple):
  position: jax.Array
  logdensity: jax.Array


class WalkInfo(NamedTuple):
  position_prev: jax.Array
  proposal: jax.Array
  acceptance_rate: jax.Array
  is_accepted: jax.Array
  log_ratio: jax.Array


def walk_init(position, logdensity_fn):
  return WalkState(position, logdensity_fn(position))


def walk(rng_key, state, logdensity_fn, scale):
  """Random walk Metropolis, the smallest sampler of the convention."""
  noise_key, accept_key = jax.random.split(rng_key)
  x = state.position
  y = x + scale * jax.random.normal(noise_key, x.shape, x.dtype)
  proposed = WalkState(y, logdensity_fn(y))
  accepted = base.accept_or_reject(
    accept_key,
    proposed.logdensity - state.logdensity,
    proposed.logdensity,
    proposed,
    state,
  )
  return accepted.state, WalkInfo(x, y, *accepted[1:])


def logdensity(x):
  return -0.5 * jnp.sum(x**2)


def states(num_chains, dim=2, fn=logdensity):
  start = jnp.linspace(-1, 1, num_chains * dim).reshape(num_chains, dim)
  return jax.vmap(lambda x: walk_init(x, fn))(start)


@pytest.mark.parametrize(
  ("log_ratio", "density", "rate"),
  [
    (0.5, 0.0, 1.0),
    (-np.inf, -np.inf, 0.0),
    (np.nan, 0.0, 0.0),
    (np.inf, np.inf, 0.0),
    (np.inf, np.nan, 0.0),
    (np.inf, -3.0, 1.0),  # left a start of zero density
    (np.log(0.25), 0.0, 0.25),
  ],
)
def test_accept_or_reject(log_ratio, density, rate):
  accepted = jax.vmap(
    lambda key: base.accept_or_reject(
      key,
      jnp.float32(log_ratio),
      jnp.float32(density),
      {"x": jnp.float32(2)},
      {"x": jnp.float32(1)},
    )
  )(jax.random.split(jax.random.key(0), 4096))
  np.testing.assert_allclose(accepted.acceptance_rate, rate, rtol=1e-6)
  moved = accepted.state["x"] == 2
  np.testing.assert_array_equal(moved, accepted.is_accepted)
  error = 5 * np.sqrt(rate * (1 - rate) / 4096)
  assert abs(float(jnp.mean(moved)) - rate) <= error


def test_runs_continue_and_chains_match_a_loop():
  step = base.bind(walk, logdensity)
  start, scale = states(3), jnp.float32(1.5)
  keep = lambda state, info: (state.position, info.proposal)  # noqa: E731
  whole = base.run_chains(
    jax.random.key(1),
    step,
    start,
    40,
    parameters=(scale,),
    trace=keep,
    batch_size=10,
  )
  first = base.run_chains(
    jax.random.key(1), step, start, 30, parameters=(scale,), batch_size=10
  )
  second = base.run_chains(
    first.rng_keys,
    step,
    first.state,
    10,
    parameters=(scale,),
    batch_size=10,
  )
  np.testing.assert_array_equal(second.state.position, whole.state.position)
  assert whole.trace[0].shape == (40, 3, 2)
  # One chain alone, step by step.
  key = jax.random.split(jax.random.key(1), 3)[2]
  state = jax.tree.map(lambda x: x[2], start)
  for number in range(40):
    key, step_key = jax.random.split(key)
    state, _ = step(step_key, state, scale)
    np.testing.assert_allclose(
      state.position, whole.trace[0][number, 2], rtol=1e-5, atol=1e-6
    )
  assert int(whole.stats.num_steps[0]) == 40
  moved = np.any(np.diff(whole.trace[0], axis=0) != 0, axis=-1).sum(0)
  assert np.all(np.abs(whole.stats.num_accepted - moved) <= 1)


def test_drawing_ahead_changes_no_number(monkeypatch):
  monkeypatch.setitem(chain_loop.UNROLL_AHEAD, "cpu", 2)

  def fn(x):
    return -jnp.sum(jnp.cosh(x))

  start = jax.jit(jax.vmap(lambda x: gi_mala.init(x, fn)))(states(3).position)
  step = base.bind(gi_mala.build_kernel(), fn)
  a = preconditioner.identity(2)

  def run(draw_ahead):
    return base.run_chains(
      jax.random.key(1),
      step,
      start,
      20,
      parameters=(jnp.float32(0.8), a),
      trace=lambda state, info: (state.position, info.acceptance_rate),
      batch_size=10,
      draw_ahead=draw_ahead,
    )

  one, five = run(1), run(5)
  np.testing.assert_allclose(five.trace[0], one.trace[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(five.trace[1], one.trace[1], rtol=1e-4)
  assert float(one.trace[1].min()) < 0.99  # coins were tossed
  np.testing.assert_array_equal(
    jax.random.key_data(five.rng_keys), jax.random.key_data(one.rng_keys)
  )
  with pytest.raises(ValueError, match=r"draw_ahead must divide batch_size"):
    run(3)


def test_one_program_for_every_step_size_and_length():
  traces = []

  def counted(rng_key, state, logdensity_fn, scale):
    traces.append(1)
    return walk(rng_key, state, logdensity_fn, scale)

  for scale, length in ((0.5, 10), (1.5, 30), (2.0, 10)):
    base.run_chains(
      jax.random.key(0),
      base.bind(counted, logdensity),
      states(2),
      length,
      parameters=(jnp.float32(scale),),
      batch_size=10,
    )
  assert len(traces) == 1


def test_non_finite_densities_are_never_entered():
  def fn(x):
    outside = jnp.sum(x**2) > 2
    return jnp.where(outside, jnp.nan, logdensity(x))

  run = base.run_chains(
    jax.random.key(0),
    base.bind(walk, fn),
    states(4, fn=fn),
    200,
    parameters=(jnp.float32(1.0),),
  )
  assert np.all(np.sum(np.square(run.state.position), -1) <= 2)
  assert np.all(np.asarray(run.stats.num_nonfinite) > 10)
  assert np.all(np.isfinite(run.stats.max_abs_log_ratio))


def test_samplers_of_blackjax_run_in_the_loop():
  algorithm = blackjax.mala(logdensity, 0.5)
  start = jax.vmap(algorithm.init)(states(2).position)
  run = base.run_chains(jax.random.key(0), algorithm.step, start, 100)
  rate = np.asarray(run.stats.acceptance_rate)
  assert np.all((rate > 0.5) & (rate < 1))
  assert np.all(np.asarray(run.stats.num_accepted) > 50)


def test_bad_arguments_are_named():
  step = base.bind(walk, logdensity)
  good = states(2)
  none = jax.tree.map(lambda x: x[:0], good)
  with pytest.raises(ValueError, match=r"num_chains must be.*num_chains=0"):
    base.run_chains(jax.random.key(0), step, none, 100)
  with pytest.raises(ValueError, match=r"num_steps must be a multiple"):
    base.run_chains(jax.random.key(0), step, good, 150)
  with pytest.raises(ValueError, match=r"state must have one leading axis"):
    base.run_chains(
      jax.random.key(0), step, walk_init(jnp.zeros(2), logdensity), 100
    )
  with pytest.raises(ValueError, match=r"rng_key must be one key"):
    base.run_chains(jax.random.split(jax.random.key(0), 3), step, good, 100)
  with pytest.raises(ValueError, match=r"position must have leaves of one"):
    base.ravel({"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.int32)})
