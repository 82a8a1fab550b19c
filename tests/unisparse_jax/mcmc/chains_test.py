# SPDX-License-Identifier: Apache-2.0
"""Whole runs: streams against stored chains, references, calibration."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.unisparse_jax.mcmc import forced
from unisparse_jax.mcmc import (
  adaptation,
  base,
  chain_loop,
  control_variates,
  estimates,
  gi_mala,
  gi_rwm,
  laplace,
  poisson,
  preconditioner,
  targets,
)

KERNEL = gi_mala.build_kernel()
ALL_TERMS = control_variates.candidates(3)


def setup(target, num_chains, functions=(poisson.Linear(), poisson.Square())):
  found = laplace.laplace(target.logdensity_fn, target.start)
  a = preconditioner.dense(found.covariance)
  white = jax.random.normal(
    jax.random.key(9), (num_chains, target.dim), found.mean.dtype
  )
  start = found.mean[None] + jax.vmap(a.root)(white)
  state = jax.jit(jax.vmap(lambda x: gi_mala.init(x, target.logdensity_fn)))(
    start
  )
  step = base.bind(KERNEL, target.logdensity_fn)
  return step, state, found.mean, a, control_variates.poisson_terms(functions)


def run(target, num_chains, num_steps, step_size, *, seed=0, **more):
  step, state, mean, a, variates = setup(target, num_chains)
  gamma = jnp.asarray(step_size, mean.dtype)

  def go(rng_key, state, num_steps):
    return base.run_chains(
      rng_key,
      step,
      state,
      num_steps,
      parameters=(gamma, a),
      collector=variates.collector,
      carry=variates.init(state.position, num_folds=2),
      collector_parameters=(poisson.Reference(gamma, mean, a),),
      **more,
    )

  # One program for both: what the first collects is dropped.
  burned = go(jax.random.key(seed + 100), state, 200)
  return go(burned.rng_keys, burned.state, num_steps)


@pytest.fixture(scope="module")
def posterior():
  """200 chains of 800 steps on a logistic posterior, at acceptance 0.77."""
  with jax.enable_x64(True):
    target = targets.load_logistic_regression("breast_cancer_mean")
    yield target, run(target, 200, 800, 1.0, batch_size=40)


def test_the_stream_is_the_stored_chain(x64):
  target = targets.student_t(8.0, dim=2)
  a = preconditioner.identity(2)
  reference = poisson.Reference(jnp.float64(0.8), jnp.zeros(2), a)
  variates = control_variates.poisson_terms(
    (poisson.Linear(), poisson.indicator(2, (1,), (0.5,)))
  )
  start = target.sample(jax.random.key(0), 3)
  result = base.run_chains(
    jax.random.key(1),
    base.bind(KERNEL, target.logdensity_fn),
    jax.jit(jax.vmap(lambda x: gi_mala.init(x, target.logdensity_fn)))(start),
    60,
    parameters=(jnp.float64(0.8), a),
    collector=variates.collector,
    carry=variates.init(start, products_of_terms=True),
    collector_parameters=(reference,),
    batch_size=10,
    trace=lambda state, info: info,
  )
  info = result.trace
  every = jax.vmap(jax.vmap(lambda i: variates.term_fn(i, reference)))
  stored = jax.jit(every)(info)
  rows = np.concatenate(
    [stored.values[:, :, None], stored.control_variates], axis=2
  )
  np.testing.assert_allclose(
    result.carry.steps.mean, rows.mean(0), rtol=1e-10, atol=1e-13
  )
  gap = rows - rows.mean(0)
  np.testing.assert_allclose(
    result.carry.steps.products,
    np.einsum("scif,scjf->cijf", gap, gap),
    rtol=1e-10,
    atol=1e-12,
  )
  # Telescoping: sum alpha dG - sum (alpha - coin) dG = G(x_n) - G(x_0), on any
  # target; it fails where x is taken after the step.
  x, y = np.asarray(info.position_prev), np.asarray(info.proposal)
  alpha, coin = np.asarray(info.acceptance_rate), np.asarray(info.is_accepted)
  moved = (y - x) / 0.8
  total = (alpha[..., None] * moved).sum(0)
  total -= ((alpha - coin)[..., None] * moved).sum(0)
  end = (np.asarray(result.state.position) - x[0]) / 0.8
  np.testing.assert_allclose(total, end, atol=1e-10)
  after = np.concatenate([x[1:], np.asarray(result.state.position)[None]])
  wrong = ((alpha - (alpha - coin))[..., None] * (y - after) / 0.8).sum(0)
  assert np.max(np.abs(wrong - end)) > 0.1


def test_terms_of_a_million_steps_have_mean_zero(x64):
  # And those of the state after accept/reject have not.
  variates = control_variates.poisson_terms(poisson.Linear())
  right = variates.collector

  def update(carry, state, info, reference):
    after = info._replace(position_prev=state.position)
    return (
      right.update(carry[0], state, info, reference),
      right.update(carry[1], state, after, reference),
    )

  def both(fn):
    return lambda carry, *more: tuple(fn(one, *more) for one in carry)

  collector = base.Collector(update, both(right.flush), both(right.open))
  a = preconditioner.diagonal(np.array([1.3]))
  gamma = jnp.float64(0.6)
  start = jnp.full((4000, 1), -0.5)
  empty = variates.init(start)
  result = base.run_chains(
    jax.random.key(3),
    base.bind(KERNEL, forced.skewed),
    jax.jit(jax.vmap(lambda x: gi_mala.init(x, forced.skewed)))(start),
    250,
    parameters=(gamma, a),
    collector=collector,
    carry=(empty, empty),
    collector_parameters=(poisson.Reference(gamma, jnp.array([-0.5]), a),),
    batch_size=50,
  )
  t = []
  for carry in result.carry:
    means = np.asarray(carry.steps.mean)[:, 1:, 0]
    t.append(means.mean(0) / (means.std(0, ddof=1) / np.sqrt(len(means))))
  assert np.max(np.abs(t[0][:2])) < 4
  assert abs(t[1][0]) > 20


def test_step_size_one_is_the_independence_sampler(x64):
  target = targets.student_t(8.0, dim=2)
  a, mean = preconditioner.identity(2), jnp.array([0.1, -0.2])
  algorithm = gi_rwm.as_top_level_api(target.logdensity_fn, 1.0, mean, a)
  state = algorithm.init(jnp.ones(2))
  key = jax.random.key(3)
  _, info = algorithm.step(key, state)
  noise = jax.random.normal(jax.random.split(key)[0], (2,))
  np.testing.assert_allclose(info.proposal, mean + noise, rtol=1e-12)


def test_a_change_of_coordinates_changes_nothing(x64):
  rng = np.random.default_rng(4)
  change = jnp.asarray(rng.standard_normal((3, 3)) + 2 * np.eye(3))
  a = preconditioner.dense(targets.random_covariance(rng, 3, 10.0))
  matrix = change @ a.matrix @ change.T
  # The same noise in both: the root is transformed too.
  b = preconditioner.Dense((matrix + matrix.T) / 2, change @ a.factor)

  def moved(x):
    return forced.curved(jnp.linalg.solve(change, x))

  x = jnp.asarray(rng.standard_normal((4, 3)))
  runs = [
    base.run_chains(
      jax.random.key(5),
      base.bind(KERNEL, fn),
      jax.jit(jax.vmap(lambda p, fn=fn: gi_mala.init(p, fn)))(start),
      30,
      parameters=(jnp.float64(0.9), c),
      batch_size=30,
      trace=lambda state, info: info.log_ratio,
    )
    for fn, start, c in (
      (forced.curved, x, a),
      (moved, x @ change.T, b),
    )
  ]
  np.testing.assert_allclose(runs[0].trace, runs[1].trace, atol=1e-9)


def test_pytrees_and_the_runner_of_blackjax(x64):
  def logdensity_fn(position):
    return forced.curved(
      jnp.concatenate([position["a"], position["b"].ravel()])
    )

  algorithm = gi_mala.as_top_level_api(
    logdensity_fn, 0.8, preconditioner.identity(4)
  )
  start = {"a": jnp.zeros(2), "b": jnp.ones((2, 1))}
  _, (states, infos) = blackjax.util.run_inference_algorithm(
    jax.random.key(0), algorithm, 50, initial_position=start
  )
  assert states.position["b"].shape == (50, 2, 1)
  moved = np.any(np.diff(states.position["b"], axis=0) != 0, axis=(1, 2))
  np.testing.assert_array_equal(moved, infos.is_accepted[1:])


def test_densities_that_are_nan_leave_accumulators_finite(x64):
  def logdensity_fn(x):
    inside = jnp.sum(x**2) < 1.5
    return jnp.where(inside, -0.5 * jnp.sum(x**2), jnp.nan)

  a = preconditioner.identity(2)
  variates = control_variates.poisson_terms(
    (poisson.Linear(), poisson.exponential(np.eye(2) * 300))
  )
  start = jnp.zeros((4, 2))
  result = base.run_chains(
    jax.random.key(0),
    base.bind(KERNEL, logdensity_fn),
    jax.jit(jax.vmap(lambda x: gi_mala.init(x, logdensity_fn)))(start),
    100,
    parameters=(jnp.float64(0.9), a),
    collector=variates.collector,
    carry=variates.init(start),
    collector_parameters=(
      poisson.Reference(jnp.float64(0.9), jnp.zeros(2), a),
    ),
  )
  assert np.all(np.sum(np.square(result.state.position), -1) < 1.5)
  assert np.all(np.asarray(result.stats.num_nonfinite) > 5)
  linear = jax.tree.map(
    lambda x: x[..., :2], result.carry.steps._replace(count=jnp.zeros((1,)))
  )
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(linear))


def test_one_program_for_all_values(x64):
  traces = []

  def counted(rng_key, state, logdensity_fn, step_size, a):
    traces.append(1)
    return KERNEL(rng_key, state, logdensity_fn, step_size, a)

  variates = control_variates.poisson_terms(poisson.Linear())
  target = targets.student_t(8.0, dim=2)
  start = jnp.zeros((2, 2))
  for step_size, variance, mean, length in (
    (0.5, 1.0, 0.0, 20),
    (1.5, 2.0, 1.0, 40),
  ):
    gamma = jnp.float64(step_size)
    a = preconditioner.diagonal(np.full(2, variance))
    reference = poisson.Reference(gamma, jnp.full((2,), mean), a)
    base.run_chains(
      jax.random.key(0),
      base.bind(counted, target.logdensity_fn),
      jax.jit(jax.vmap(lambda x: gi_mala.init(x, target.logdensity_fn)))(start),
      length,
      parameters=(gamma, a),
      collector=variates.collector,
      carry=variates.init(start),
      collector_parameters=(reference,),
      batch_size=20,
    )
  assert len(traces) == 1


def test_factors_on_a_logistic_posterior(posterior, x64):
  _, result = posterior
  rate = float(result.stats.acceptance_rate.mean())
  assert 0.7 < rate < 0.85
  fixed = estimates.estimate(result.carry, (1.0, 1.0), terms=(0, 1))
  two = estimates.estimate(result.carry, terms=(0, 1))
  with_score = estimates.estimate(result.carry)
  # Measured: 3.2, 3.4 and 50.
  assert np.median(fixed.factor) > 2
  assert np.median(two.factor) > 2
  assert np.median(with_score.factor) > 15
  choice = estimates.choose(result.carry, ALL_TERMS)
  assert np.median(choice.estimate.factor) > np.median(with_score.factor) / 1.1
  assert np.all(choice.estimate.factor > 1)
  assert np.all(np.abs(fixed.r_hat - 1) < 0.02)


def test_intervals_cover(posterior, x64):
  _, result = posterior
  carry = jax.device_get(result.carry)
  truth = estimates.choose(carry, ALL_TERMS).estimate
  inside = []
  for chain in range(200):
    one = estimates.estimate(jax.tree.map(lambda x, c=chain: x[c], carry))
    low, high = one.interval(0.95)
    # Of 200 chains together, the truth is known 14 times better.
    inside.append((low < truth.mean) & (truth.mean < high))
  coverage = np.mean(inside, axis=0)
  assert 0.91 < np.mean(coverage) < 0.98
  assert np.min(coverage) > 0.87


def test_means_agree_with_nuts(posterior, x64):
  target, result = posterior
  ours = estimates.choose(result.carry, ALL_TERMS).estimate
  found = laplace.laplace(target.logdensity_fn, target.start)
  nuts = blackjax.nuts(target.logdensity_fn, 0.4, found.covariance)
  start = jax.vmap(nuts.init)(jnp.tile(found.mean[None], (8, 1)))
  chains = base.run_chains(
    jax.random.key(8),
    nuts.step,
    start,
    300,
    trace=lambda state, info: state.position,
  ).trace
  chains = np.asarray(chains)[50:]
  both = np.concatenate([chains, chains**2], axis=2)
  means = both.reshape(5, 50, 8, -1).mean(1).reshape(40, -1)
  error = means.std(0, ddof=1) / np.sqrt(len(means))
  gap = np.abs(both.mean((0, 1)) - ours.mean)
  assert np.max(gap / np.sqrt(error**2 + ours.mcse**2)) < 4


def test_simulation_based_calibration(x64):
  # 100 data sets of a logistic regression with 3 coefficients.
  num_sets, num_rows, num_draws = 100, 20, 99
  key = jax.random.key(11)
  keys = jax.random.split(key, 4)
  truth = jax.random.normal(keys[0], (num_sets, 3))
  design = jax.random.normal(keys[1], (num_sets, num_rows, 3))
  logits = jnp.einsum("sri,si->sr", design, truth)
  uniform = jax.random.uniform(keys[2], logits.shape)
  labels = uniform < jax.nn.sigmoid(logits)
  signed = design * jnp.where(labels, 1.0, -1.0)[..., None]
  a = preconditioner.identity(3)._replace(variance=jnp.full((3,), 0.25))

  @jax.jit
  def ranks(rng_key, signed, truth):
    def logdensity_fn(x):
      return -jnp.sum(jax.nn.softplus(-(signed @ x))) - 0.5 * jnp.sum(x**2)

    def one(state, rng_key):
      return KERNEL(rng_key, state, logdensity_fn, 0.8, a)[0], state.position

    state = gi_mala.init(truth * 0, logdensity_fn)
    _, chain = jax.lax.scan(one, state, jax.random.split(rng_key, 1090))
    thinned = chain[100::10]
    return jnp.sum(thinned < truth[None], axis=0)

  found = jax.vmap(ranks)(jax.random.split(keys[3], num_sets), signed, truth)
  found = np.asarray(found)
  for coordinate in range(3):
    counts, _ = np.histogram(found[:, coordinate], bins=10, range=(0, 100))
    assert scipy.stats.chisquare(counts).pvalue > 0.005
  assert found.max() <= num_draws


def test_geweke(x64):
  # (x, y) ~ prior x likelihood; then x by the sampler and y by the model, again
  # and again: the law of x stays the prior.
  num_chains, num_rows = 2000, 5
  keys = jax.random.split(jax.random.key(12), 3)
  design = jax.random.normal(keys[0], (num_rows, 2))
  a = preconditioner.diagonal(np.full(2, 0.5))

  def one_chain(rng_key, x):
    def round_(x, rng_key):
      data_key, step_key = jax.random.split(rng_key)
      uniform = jax.random.uniform(data_key, (num_rows,))
      sign = jnp.where(uniform < jax.nn.sigmoid(design @ x), 1.0, -1.0)

      def logdensity_fn(z):
        fit = -jnp.sum(jax.nn.softplus(-sign * (design @ z)))
        return fit - 0.5 * jnp.sum(z**2)

      state = gi_mala.init(x, logdensity_fn)
      return KERNEL(step_key, state, logdensity_fn, 1.2, a)[0].position, None

    return jax.lax.scan(round_, x, jax.random.split(rng_key, 20))[0]

  start = jax.random.normal(keys[1], (num_chains, 2))
  end = jax.jit(jax.vmap(one_chain))(
    jax.random.split(keys[2], num_chains), start
  )
  for coordinate in range(2):
    result = scipy.stats.kstest(np.asarray(end)[:, coordinate], "norm")
    assert result.pvalue > 0.005
  assert np.mean(np.abs(np.asarray(end) - np.asarray(start))) > 0.5


def test_adaptation_lands_on_its_target(x64):
  target = targets.load_logistic_regression("breast_cancer_mean")
  step, state, _, _, variates = setup(target, 16)
  flat = preconditioner.identity(target.dim)._replace(
    variance=jnp.full((target.dim,), 0.3)
  )
  for goal in (0.775, 0.95):
    adapted = adaptation.warm_up(
      jax.random.key(0),
      step,
      state,
      flat,
      windows=(200, 200),
      final_steps=200,
      target_acceptance=goal,
    )
    assert abs(float(adapted.acceptance_rate) - goal) < 0.02
    result = base.run_chains(
      adapted.rng_keys,
      step,
      adapted.state,
      200,
      parameters=(adapted.step_size, adapted.preconditioner),
      # As `tune_step_size` below: no other program.
      collector=variates.collector,
      carry=variates.init(adapted.state.position),
      collector_parameters=(
        poisson.Reference(
          adapted.step_size, adapted.mean, adapted.preconditioner
        ),
      ),
      batch_size=50,
    )
    assert abs(float(result.stats.acceptance_rate.mean()) - goal) < 0.03
  found = laplace.laplace(target.logdensity_fn, target.start)
  ratio = np.diag(adapted.preconditioner.matrix) / np.diag(found.covariance)
  assert np.all((ratio > 0.6) & (ratio < 2.5))
  # Without the score, the controlled mean wants far smaller steps than the
  # plain one does.
  two = {"two": estimates.Candidate(terms=(0, 1))}
  tuned = {
    objective: adaptation.tune_step_size(
      adapted.rng_keys,
      step,
      adapted.state,
      variates.collector,
      variates.init(adapted.state.position),
      candidates=two,
      objective=objective,
      rest=(adapted.preconditioner,),
      reference_fn=lambda gamma: poisson.Reference(
        gamma, adapted.mean, adapted.preconditioner
      ),
      grid=(0.2, 0.8),
      num_steps=500,
      batch_size=50,
    )
    for objective in (adaptation.PLAIN, adaptation.CONTROLLED)
  }
  assert tuned["plain"].step_size == 0.8
  assert tuned["controlled"].step_size == 0.2
  assert tuned["controlled"].errors.min() < tuned["plain"].errors.min()
  with pytest.raises(ValueError, match=r"kind must be a known name"):
    adaptation.warm_up(jax.random.key(0), step, state, flat, kind="full")


def test_adaptation_leaves_noise_where_everything_is_accepted(x64):
  # On a Gaussian no step_size lands on the target: it grows to its bound.
  a = preconditioner.identity(2)
  step = base.bind(KERNEL, lambda x: -0.5 * jnp.sum(x**2))
  state = jax.vmap(lambda x: gi_mala.init(x, lambda y: -0.5 * jnp.sum(y**2)))(
    jnp.ones((4, 2))
  )
  window = adaptation.adapt_step_size(
    jax.random.key(0), step, state, 300, rest=(a,), target_acceptance=0.5
  )
  np.testing.assert_allclose(window.step_size, 1.99, rtol=1e-5)


def test_other_directions_and_thresholds_do_not_compile_again(x64):
  target = targets.student_t(8.0, dim=2)
  a = preconditioner.identity(2)
  gamma = jnp.float64(0.8)
  reference = poisson.Reference(gamma, jnp.zeros(2), a)
  start = target.sample(jax.random.key(0), 2)
  step = base.bind(KERNEL, target.logdensity_fn)
  state = jax.jit(jax.vmap(lambda x: gi_mala.init(x, target.logdensity_fn)))(
    start
  )

  def functions(directions, threshold):
    return (
      poisson.exponential(directions, num_terms=2),
      poisson.indicator(2, (1,), (threshold,), num_terms=2),
    )

  def go(variates, given, carry=None):
    if carry is None:
      carry = variates.init(start, functions=given[0] if given else None)
    return base.run_chains(
      jax.random.key(1),
      step,
      state,
      20,
      parameters=(gamma, a),
      collector=variates.collector,
      carry=carry,
      collector_parameters=(reference, *given),
      batch_size=10,
    ).carry.steps.mean

  first = functions(np.array([[0.1, 0.2]]), 0.5)
  other = functions(np.array([[0.3, -0.2]]), -0.4)
  variates = control_variates.poisson_terms(first)
  go(variates, (first,))
  compiled = chain_loop.run_untraced._cache_size()
  found = go(variates, (other,))
  assert chain_loop.run_untraced._cache_size() == compiled
  expected = go(control_variates.poisson_terms(other), ())
  np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)
  assert np.max(np.abs(found - go(variates, (first,)))) > 0.01
  more = functions(np.array([[0.3, -0.2], [0.1, 0.1]]), -0.4)
  for wrong in (other[:1], more):
    with pytest.raises(ValueError, match=r"functions must differ in arrays"):
      go(variates, (wrong,))
  with pytest.raises(ValueError, match=r"carry must have shape.*=2"):
    go(variates, (), control_variates.poisson_terms(more).init(start))
