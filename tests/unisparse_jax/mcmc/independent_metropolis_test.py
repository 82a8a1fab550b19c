# SPDX-License-Identifier: Apache-2.0
import blackjax
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from unisparse_jax.mcmc import (
  accumulators,
  base,
  estimates,
  expectations,
  independent_blocks,
  proposals,
)
from unisparse_jax.mcmc import independent_metropolis as sampler

KERNEL = sampler.build_kernel()


def skewed(x):
  """Log-density of independent exp(1) logarithms: asymmetric, mean -0.577."""
  return jnp.sum(x - jnp.exp(x))


def standard_normal(x):
  return -0.5 * jnp.sum(jnp.square(x))


def wide(dim=1, mean=-0.6, variance=2.5):
  return proposals.gaussian(np.full(dim, mean), variance * np.eye(dim))


def one_step_to(y, x, logdensity_fn, proposal, key=0):
  """The kernel's step from x whose draw is y."""
  fixed = proposals.FunctionProposal(
    (proposal, y),
    lambda parameters, rng_key: parameters[1],
    lambda parameters, position: parameters[0].logdensity(position),
  )
  state = sampler.init(x, logdensity_fn, fixed)
  return KERNEL(jax.random.key(key), state, logdensity_fn, fixed)


def test_detailed_balance_of_the_exact_transition_density(x64):
  proposal = proposals.defensive(wide(3), weight=0.2)
  log_q = scipy.stats.multivariate_normal(np.full(3, -0.6), 2.5 * np.eye(3))
  heavy = scipy.stats.multivariate_t(np.full(3, -0.6), 5 * np.eye(3), df=5)

  def log_move(x, y):
    """log pi(x) q(y) alpha(x, y), densities by scipy."""
    rate = one_step_to(y, x, skewed, proposal)[1].acceptance_rate
    q = np.log(0.8 * log_q.pdf(y) + 0.2 * heavy.pdf(y))
    return float(skewed(x)) + q + np.log(float(rate))

  points = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)))
  for x, y in zip(points[:6], points[6:], strict=True):
    np.testing.assert_allclose(log_move(x, y), log_move(y, x), rtol=1e-12)


def grid_kernel(points=801):
  """Grid, pi, q and alpha [x, y] of the skewed target in one dimension."""
  grid = np.linspace(-13, 3.2, points)
  normal = scipy.stats.norm(-0.6, np.sqrt(2.5))
  log_pi, log_q = grid - np.exp(grid), normal.logpdf(grid)
  pi, q = np.exp(log_pi), np.exp(log_q)
  pi, q = pi / pi.sum(), q / q.sum()
  level = log_pi - log_q
  alpha = np.exp(np.minimum(level[None] - level[:, None], 0))
  return grid, pi, q, level, alpha


def test_terms_have_mean_zero_by_quadrature(x64):
  grid, pi, q, level, alpha = grid_kernel()
  joint = pi[:, None] * q[None]
  for f in (lambda x: x, lambda x: x * x, np.exp):
    value = np.broadcast_to(f(grid)[:, None], alpha.shape)
    proposed = np.broadcast_to(f(grid)[None], alpha.shape)
    ahead = np.broadcast_to(level[None], alpha.shape)
    behind = np.broadcast_to(level[:, None], alpha.shape)
    rows = sampler.control(
      *map(jnp.asarray, (value, proposed)),
      float(q @ f(grid)),
      *map(jnp.asarray, (alpha, behind, ahead)),
    )
    means = np.einsum("xy,txy->t", joint, np.asarray(rows))
    np.testing.assert_allclose(means, 0, atol=1e-12)
    # With x after the accept step in place of x before it, they have not.
    wrong = joint * alpha * (1 - alpha) * (proposed - value)
    assert abs(wrong.sum()) > 1e-3
    # The estimator's mean is pi(F), for the combination with fixed numbers.
    fixed = value + np.asarray(rows[0]) - np.asarray(rows[1])
    np.testing.assert_allclose((joint * fixed).sum(), pi @ f(grid), rtol=1e-12)


def test_discretised_kernel(x64):
  grid, pi, q, _, alpha = grid_kernel()
  move = q[None] * alpha
  kernel = move + np.diag(1 - move.sum(1))
  np.testing.assert_allclose(kernel.sum(1), 1, rtol=1e-12)
  np.testing.assert_allclose(pi @ kernel, pi, atol=1e-15)
  # The chain of the library moves as this matrix says: E[F(x1) | x0].
  start = jnp.full((20_000, 1), -2.0)
  states = jax.vmap(lambda x: sampler.init(x, skewed, wide()))(start)
  keys = jax.random.split(jax.random.key(3), len(start))
  after, info = jax.vmap(lambda k, s: KERNEL(k, s, skewed, wide()))(
    keys, states
  )
  row = kernel[np.argmin(np.abs(grid + 2.0))]
  for f in (lambda x: x, lambda x: x * x):
    drawn = f(np.asarray(after.position)[:, 0])
    error = drawn.std() / np.sqrt(len(drawn))
    assert abs(drawn.mean() - row @ f(grid)) < 4 * error
  coins, rates = np.asarray(info.is_accepted), np.asarray(info.acceptance_rate)
  assert abs(coins.mean() - rates.mean()) < 0.02


@hypothesis.given(
  shift=st.floats(-2, 2), scale=st.floats(0.4, 2.5), dof=st.floats(3, 50)
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_rejections_are_bounded_by_kl(shift, scale, dof):
  grid = np.linspace(-60, 60, 1501)
  step = grid[1] - grid[0]
  log_pi = scipy.stats.norm(shift, scale).logpdf(grid)
  for log_q in (
    scipy.stats.norm.logpdf(grid),
    scipy.stats.t(dof).logpdf(grid),
  ):
    pi, q = np.exp(log_pi) * step, np.exp(log_q) * step
    level = log_pi - log_q
    with np.errstate(over="ignore"):
      rate = np.exp(np.minimum(level[None] - level[:, None], 0))
    refused = pi @ (1 - rate) @ q
    forward = float(pi @ level)
    reverse = float(-(q @ level))
    assert refused <= np.sqrt(2 * forward) + 1e-9
    assert refused <= np.sqrt(2 * reverse) + 1e-9
    assert refused <= np.sqrt((forward + reverse) / 2) + 1e-9


def exact_case(dim=3):
  rng = np.random.default_rng(0)
  factor = rng.normal(size=(dim, dim))
  proposal = proposals.gaussian(
    rng.normal(size=dim), factor @ factor.T + np.eye(dim)
  )
  functional = expectations.Stacked(
    (
      expectations.coordinates(dim),
      expectations.Squares(),
      expectations.Exponential(0.2 * jnp.eye(dim)),
      expectations.NormalCdf(jnp.eye(dim), jnp.zeros(dim)),
      expectations.Tail(jnp.eye(dim), jnp.zeros(dim)),
    )
  )
  return proposal, functional


def test_zero_variance_where_the_proposal_is_the_target(x64):
  proposal, functional = exact_case()
  state = independent_blocks.init_chains(
    jax.random.key(0), proposal.logdensity, proposal, 50
  )
  run = independent_blocks.run_chains(
    jax.random.key(1),
    proposal.logdensity,
    proposal,
    state,
    500,
    functional=functional,
  )
  assert np.all(np.asarray(run.stats.num_accepted) == 500)
  assert np.all(np.asarray(run.stats.acceptance_rate) == 1)
  exact = np.asarray(expectations.expectation(functional, proposal))
  for coef, numbers in ((sampler.FIXED, sampler.BASIC), ("batch_means", None)):
    result = estimates.estimate(run.carry, coef, terms=numbers)
    assert np.all(result.chain_means.std(0) < 1e-12)  # measured: 7e-15
    np.testing.assert_allclose(result.mean, exact, rtol=1e-12)
    assert np.all(result.plain_chain_means.std(0) > 1e-3)
  # A mean under q that is off by 1% moves the estimate by that.
  run = independent_blocks.run_chains(
    jax.random.key(1),
    proposal.logdensity,
    proposal,
    state,
    500,
    functional=functional,
    expectation=jnp.asarray(exact * 1.01),
  )
  result = estimates.estimate(run.carry, sampler.FIXED, terms=sampler.BASIC)
  np.testing.assert_allclose(result.mean, exact * 1.01, rtol=1e-12)


@pytest.mark.parametrize(
  ("shift", "at_least"), [(0.02, 1000), (0.1, 40), (0.3, 4)]
)
def test_shifted_gaussian_beats_independent_draws(x64, shift, at_least):
  """Median over the coordinates, of which one is shifted."""
  proposal = proposals.gaussian(np.array([shift, 0, 0]), np.eye(3))
  start = jax.random.normal(jax.random.key(0), (400, 3))
  state = jax.jit(
    jax.vmap(lambda x: sampler.init(x, standard_normal, proposal))
  )(start)
  run = independent_blocks.run_chains(
    jax.random.key(1), standard_normal, proposal, state, 1000
  )
  result = estimates.estimate(run.carry)
  gain = 1 / 1000 / result.chain_means.var(0)
  assert np.median(gain) > at_least  # measured: 2450, 93, 8.6
  assert np.all(np.abs(result.mean) < 4.5 * result.mcse)
  basic = estimates.estimate(run.carry, terms=sampler.BASIC)
  more = np.median(basic.chain_means.var(0) / result.chain_means.var(0))
  assert more > 1.2  # H3 to H5; measured: 1.5 to 1.7


def test_blocks_and_steps_are_one_sampler(x64):
  """Blocks of one chain, replayed by the accept step of the base."""
  target, proposal = skewed, wide(2)
  num_steps = 60
  state = independent_blocks.init_chains(jax.random.key(0), target, proposal, 3)
  keys = base.chain_keys(jax.random.key(1), 3)
  functional = expectations.means_and_squares(2)
  run = independent_blocks.run_chains(
    keys, target, proposal, state, num_steps, functional=functional,
    block_size=20,
  )  # fmt: skip
  exact = np.asarray(expectations.expectation(functional, proposal))
  reference = float(np.mean(state.log_weight))
  for chain in range(3):
    key = keys[chain]
    x = np.asarray(state.position[chain])
    level = float(state.log_weight[chain])
    rows = []
    for _ in range(num_steps // 20):
      split = jax.random.split(key, 22)
      key = split[0]
      coins = np.asarray(jax.random.uniform(split[1], (20,), x.dtype))
      for coin, draw_key in zip(coins, split[2:], strict=True):
        y = proposal.sample(draw_key)
        ahead = float(target(y) - proposal.logdensity(y))
        info = sampler.IMInfo(
          jnp.asarray(x),
          y,
          jnp.exp(jnp.minimum(ahead - level, 0.0)),
          None,
          None,
          jnp.asarray(ahead),
          jnp.asarray(level),
        )
        term = sampler.terms(info, functional, jnp.asarray(exact), reference)
        rows.append(np.concatenate([term.values[None], term.control_variates]))
        if coin < float(info.acceptance_rate):
          x, level = np.asarray(y), ahead
    rows = np.stack(rows)
    np.testing.assert_allclose(run.state.position[chain], x, rtol=1e-12)
    steps = jax.tree.map(lambda a, c=chain: a[c], run.carry.steps)
    np.testing.assert_allclose(steps.mean, rows.mean(0), rtol=1e-10)
    centred = rows - rows.mean(0)
    np.testing.assert_allclose(
      steps.products,
      np.einsum("nip,njp->ijp", centred, centred),
      rtol=1e-9,
      atol=1e-9,
    )
  # The same run in two halves.
  half = independent_blocks.run_chains(
    keys, target, proposal, state, 20, functional=functional, block_size=20
  )
  rest = independent_blocks.run_chains(
    half.rng_keys, target, proposal, half.state, 40, functional=functional,
    accumulator=half.carry, block_size=20,
  )  # fmt: skip
  np.testing.assert_array_equal(rest.state.position, run.state.position)
  plain, again = run.carry.steps.mean, rest.carry.steps.mean
  # H4 and H5 are about another reference.
  np.testing.assert_allclose(again[:, :4], plain[:, :4], rtol=1e-12, atol=1e-15)


def light_tailed(x):
  """As `skewed`, with Gaussian tails: `wide(variance=6)` bounds pi / q."""
  return skewed(x) - 0.1 * jnp.sum(jnp.square(x))


def test_step_by_step_gives_the_same_answer(x64):
  """The kernel in the shared loop against the blocks: same law, other keys."""
  proposal = wide(2, variance=6.0)
  functional = expectations.means_and_squares(2)
  exact = expectations.expectation(functional, proposal)
  state = jax.jit(jax.vmap(lambda x: sampler.init(x, light_tailed, proposal)))(
    jax.random.normal(jax.random.key(0), (100, 2))
  )
  centres = jnp.broadcast_to(exact, (100, 4))
  reference = jnp.mean(state.log_weight)
  by_step = base.run_chains(
    jax.random.key(1),
    base.bind(KERNEL, light_tailed),
    state,
    1000,
    parameters=(proposal,),
    collector=sampler.collector,
    carry=accumulators.init_chains(centres, sampler.NUM_TERMS),
    collector_parameters=(functional, exact, reference),
  )
  blocks = independent_blocks.run_chains(
    jax.random.key(2),
    light_tailed,
    proposal,
    state,
    1000,
    functional=functional,
  )
  first, second = map(estimates.estimate, (by_step.carry, blocks.carry))
  gap = first.mean - second.mean
  assert np.all(np.abs(gap) < 4 * np.hypot(first.mcse, second.mcse))
  np.testing.assert_allclose(first.mcse, second.mcse, rtol=0.4)
  rates = by_step.stats.acceptance_rate, blocks.stats.acceptance_rate
  assert abs(np.mean(rates[0]) - np.mean(rates[1])) < 0.01
  grid = np.linspace(-20, 5, 5001)
  weight = np.exp(grid - np.exp(grid) - 0.1 * grid**2)
  moments = [weight @ grid**k / weight.sum() for k in (1, 1, 2, 2)]
  recycled = estimates.estimate(
    by_step.carry, sampler.WASTE_RECYCLING, terms=sampler.BASIC
  )
  for result in (first, second, recycled):
    assert np.all(np.abs(result.mean - moments) < 4 * result.mcse)


def test_basic_terms_are_the_first_two(x64):
  functional, exact = expectations.coordinates(2), jnp.zeros(2)
  _, info = one_step_to(jnp.ones(2), jnp.zeros(2), skewed, wide(2))
  basic = sampler.basic_terms(info, functional, exact)
  full = sampler.terms(info, functional, exact, jnp.zeros(()))
  np.testing.assert_array_equal(basic.values, full.values)
  np.testing.assert_array_equal(
    basic.control_variates, full.control_variates[:2]
  )


def test_blackjax_runs_it_and_positions_are_pytrees(x64):
  def logdensity_fn(position):
    return skewed(position["a"]) + skewed(position["b"][0])

  algorithm = sampler.as_top_level_api(logdensity_fn, wide(4))
  start = {"a": jnp.zeros(2), "b": (jnp.zeros(2),)}
  state, history = blackjax.util.run_inference_algorithm(
    rng_key=jax.random.key(0),
    inference_algorithm=algorithm,
    initial_position=start,
    num_steps=300,
  )
  assert jax.tree.structure(state.position) == jax.tree.structure(start)
  infos = history[1]
  assert infos.proposal.shape == (300, 4)
  assert 0.3 < np.mean(infos.acceptance_rate) < 1
  states = independent_blocks.init_chains(
    jax.random.key(0),
    logdensity_fn,
    wide(4),
    5,
    unravel=base.ravel(start)[1],
  )
  run = independent_blocks.run_chains(
    jax.random.key(1), logdensity_fn, wide(4), states, 200
  )
  assert run.state.position["b"][0].shape == (5, 2)
  at = jax.tree.map(lambda x: x[2], run.state.position)
  np.testing.assert_allclose(run.state.logdensity[2], logdensity_fn(at))


def test_non_finite_densities_are_never_entered(x64):
  def logdensity_fn(x):
    bad = jnp.where(x[0] > -2, jnp.nan, jnp.where(x[0] > -3, jnp.inf, -jnp.inf))
    return jnp.where(x[0] > -1, skewed(x), bad)

  proposal = wide(1)
  state = jax.jit(jax.vmap(lambda x: sampler.init(x, logdensity_fn, proposal)))(
    jnp.zeros((20, 1))
  )
  run = independent_blocks.run_chains(
    jax.random.key(0), logdensity_fn, proposal, state, 400,
    functional=expectations.means_and_squares(1),
  )  # fmt: skip
  assert np.all(np.asarray(run.state.position) > -1)
  assert np.all(np.asarray(run.stats.num_nonfinite) > 50)
  result = estimates.estimate(run.carry)
  grid = np.linspace(-1, 4, 4001)
  weight = np.exp(grid - np.exp(grid))
  exact = [weight @ grid / weight.sum(), weight @ grid**2 / weight.sum()]
  assert np.all(np.isfinite(result.mcse))
  assert np.all(np.abs(result.mean - exact) < 4 * result.mcse)
  for bad in (-1.5, -2.5, -3.5):
    after, info = one_step_to(
      jnp.full(1, bad), jnp.zeros(1), logdensity_fn, proposal
    )
    assert info.acceptance_rate == 0 and not info.is_accepted
    assert after.position == 0


def test_values_do_not_compile_again(x64):
  traces = []

  def logdensity_fn(x):
    traces.append(1)
    return skewed(x)

  state = independent_blocks.init_chains(jax.random.key(0), skewed, wide(2), 4)
  for number in range(3):
    functional = expectations.Linear(jnp.eye(2) * (1 + number))
    independent_blocks.run_chains(
      jax.random.key(number),
      logdensity_fn,
      wide(2, mean=-0.5 - 0.1 * number),
      state,
      100 * (1 + number),
      functional=functional,
    )
    if number == 0:
      first = len(traces)
  assert len(traces) == first


def test_bad_arguments():
  proposal = wide()
  state = jax.jit(jax.vmap(lambda x: sampler.init(x, skewed, proposal)))(
    jnp.zeros((2, 1))
  )
  key = jax.random.key(0)
  run = independent_blocks.run_chains
  with pytest.raises(TypeError, match="must have a method logdensity"):
    sampler.as_top_level_api(skewed, Sampler())
  with pytest.raises(TypeError, match="proposal must have a method sample"):
    run(key, skewed, skewed, state, 100)
  with pytest.raises(ValueError, match="num_steps must be a multiple of block"):
    run(key, skewed, proposal, state, 150)
  with pytest.raises(ValueError, match="num_terms must be 2 or 5"):
    run(key, skewed, proposal, state, 100, num_terms=3)
  with pytest.raises(ValueError, match="num_chains must be an integer >= 1"):
    independent_blocks.init_chains(key, skewed, proposal, 0)
  flow = proposals.FunctionProposal(
    (), lambda _, k: jnp.zeros(1), lambda _, x: jnp.zeros(())
  )
  with pytest.raises(ValueError, match="functional must have a known mean"):
    run(key, skewed, flow, state, 100)


class Sampler:
  """A proposal as BlackJAX's irmh takes it: no density."""

  def sample(self, rng_key):
    return jax.random.normal(rng_key, (1,))
