# SPDX-License-Identifier: Apache-2.0
"""Costs, the joint search, the bound, and the learned predictor."""

import itertools

import numpy as np
import pytest

from tests.unisparse_jax.speculative.calibration import made_up
from unisparse_jax.speculative import calibration
from unisparse_jax.speculative.calibration import predictor

COSTS = calibration.StepCosts(
  batch=1,
  buckets=(1, 3, 5, 9),
  fixed_ms=0.3,
  draft_ms=0.2,
  verify_ms=(1.0, 1.2, 1.5, 2.2),
  plain_ms=1.0,
)


def two_kinds(n=400, seed=0):
  """Low entropy accepts 6 to 8 tokens, high entropy 0 or 1."""
  rng = np.random.default_rng(seed)
  easy = rng.random(n) < 0.5
  entropy = np.where(easy, rng.uniform(0, 1, n), rng.uniform(4, 8, n))
  accepted = np.where(easy, rng.integers(6, 9, n), rng.integers(0, 2, n))
  return made_up.chains(entropy, accepted, 8), easy


def make_arms(records, depths=(2, 4, 8), nodes=(0, 2, 4, 8)):
  return calibration.Arms.of(records, depths=depths, nodes=nodes, base_depth=2)


def test_costs_are_recovered_from_timings():
  timed = [
    (levels, bucket, COSTS.step_ms(levels, bucket - 1).item())
    for levels in (2, 8)
    for bucket in COSTS.buckets
  ]
  found = calibration.fit_costs(
    timed, batch=1, buckets=COSTS.buckets, plain_ms=1.0
  )
  for levels, bucket, time_ms in timed:
    assert found.step_ms(levels, bucket - 1) == pytest.approx(time_ms)
  assert found.draft_ms == pytest.approx(0.2)
  with pytest.raises(ValueError, match="measurements must cover"):
    calibration.fit_costs(
      timed[:4], batch=1, buckets=COSTS.buckets, plain_ms=1.0
    )
  with pytest.raises(ValueError, match="nodes must fit"):
    COSTS.step_ms(2, 9)


def test_the_search_finds_what_trying_everything_finds():
  records, easy = two_kinds()
  arms = make_arms(records)
  bins = np.where(easy, 0, 1)
  choice = calibration.by_bin(arms, bins, COSTS, num_bins=2)
  best = 0.0
  times = arms.times(COSTS)
  for table in itertools.product(range(len(arms.arms)), repeat=2):
    picked = np.asarray(table)[bins]
    tokens = np.take_along_axis(arms.tokens, picked[:, None], 1).mean()
    best = max(best, tokens / times[picked].mean())
  assert choice.rate == pytest.approx(best)
  assert choice.depth[0] == 8
  assert choice.nodes[0] == 8
  assert choice.nodes[1] <= 2
  single = calibration.fixed(arms, COSTS)
  oracle = calibration.oracle(arms, COSTS)
  assert single.rate < choice.rate <= oracle.rate


def test_fewest_nodes_bring_what_is_asked_for():
  records, easy = two_kinds()
  arms = make_arms(records)
  bins = np.where(easy, 0, 1)
  sizes = np.array([n for _, n in arms.arms]) + 1
  tried = []  # (mean nodes, mean tokens) of every table
  for table in itertools.product(range(len(arms.arms)), repeat=2):
    picked = np.asarray(table)[bins]
    tokens = np.take_along_axis(arms.tokens, picked[:, None], 1).mean()
    tried.append((sizes[picked].mean(), tokens))
  # With 8 levels and 8 nodes everywhere, the most that can be had.
  most = max(tokens for _, tokens in tried)
  for share in (1.0, 0.9):
    choice = calibration.fewest_nodes(
      arms, bins, COSTS, num_bins=2, least_tokens=share * most
    )
    assert choice.tokens_per_step >= share * most - 1e-6
    nodes = (choice.nodes + 1)[bins].mean()
    if share == 1.0:
      enough = [n for n, tokens in tried if tokens >= most - 1e-6]
      assert nodes == pytest.approx(min(enough))
      assert nodes < 9.0  # that tree in every step
    else:
      # No table brings as much and is better by its price.
      assert not any(
        n < nodes and x >= choice.tokens_per_step for n, x in tried
      )
  beyond = calibration.fewest_nodes(
    arms, bins, COSTS, num_bins=2, least_tokens=2 * most
  )
  assert beyond.tokens_per_step == pytest.approx(most)
  # At given depths: all arms of them are tried.
  depth = np.array([8, 4])
  levels = np.array([d for d, _ in arms.arms])
  allowed = [np.flatnonzero(levels == d) for d in depth]
  tables = [np.array(t)[bins] for t in itertools.product(*allowed)]
  brought = [
    np.take_along_axis(arms.tokens, picked[:, None], 1).mean()
    for picked in tables
  ]
  choice = calibration.fewest_nodes(
    arms, bins, COSTS, num_bins=2, least_tokens=max(brought), depth=depth
  )
  np.testing.assert_array_equal(choice.depth, depth)
  assert (choice.nodes + 1)[bins].mean() == min(
    sizes[picked].mean()
    for picked, tokens in zip(tables, brought, strict=True)
    if tokens >= max(brought) - 1e-6
  )


def test_a_bin_without_steps_gets_the_best_single_arm():
  records, easy = two_kinds()
  arms = make_arms(records)
  choice = calibration.by_bin(arms, np.where(easy, 1, 2), COSTS, num_bins=4)
  single = calibration.fixed(arms, COSTS)
  for index in (0, 3):
    assert choice.depth[index] == single.depth[0]
    assert choice.nodes[index] == single.nodes[0]


def test_a_batch_waits_for_its_largest_row():
  records, easy = two_kinds()
  arms = make_arms(records)
  bins = np.where(easy, 0, 1)
  costs = {
    batch: calibration.StepCosts(**{**vars(COSTS), "batch": batch})
    for batch in (1, 16)
  }
  alone, together = (
    calibration.by_bin(arms, bins, costs[b], num_bins=2) for b in (1, 16)
  )
  assert together.rate < alone.rate
  table = np.array(
    [arms.arms.index((int(d), int(n))) for d, n in
     zip(alone.depth, alone.nodes, strict=True)]
  )  # fmt: skip
  reused = calibration.evaluate(arms, bins, costs[16], table)
  single = calibration.evaluate(
    arms, np.zeros_like(bins), costs[16],
    np.array([arms.arms.index((8, 8))]),
  )  # fmt: skip
  assert together.rate >= max(reused.rate, single.rate) * (1 - 1e-9)


def test_a_tree_of_one_where_nothing_is_accepted():
  records = made_up.chains(np.ones(100), np.zeros(100, int), 8)
  choice = calibration.by_bin(
    make_arms(records), np.zeros(100, int), COSTS, num_bins=8
  )
  assert set(choice.nodes) == {0}
  assert choice.rate * COSTS.plain_ms < 1.0  # so the artefact says: no drafts


def test_the_predictor_uses_the_record_of_a_request():
  # Entropy says nothing; whole requests are easy or hard.
  rng = np.random.default_rng(0)
  requests = np.repeat(np.arange(60), 20)
  easy = rng.random(60)[requests] < 0.5
  accepted = np.where(easy, 8, 0)
  records = made_up.chains(rng.uniform(1, 2, 1200), accepted, 8, requests)
  is_out = requests >= 40
  train, test = records.take(~is_out), records.take(is_out)
  arms, test_arms = make_arms(train), make_arms(test)
  times = arms.times(COSTS)
  thresholds = calibration.fit_thresholds(train.entropy, train.terminal_rank)

  def rate(model):
    picked = model.choose(test, times, model.rate(train, arms, times))
    tokens = np.take_along_axis(test_arms.tokens, picked[:, None], 1).mean()
    return tokens / times[picked].mean()

  blind = rate(predictor.fit(train, arms, thresholds, use_recent=False))
  seeing = rate(predictor.fit(train, arms, thresholds))
  assert seeing > 1.15 * blind
  bound = calibration.oracle(test_arms, COSTS).rate
  assert seeing <= bound * (1 + 1e-9)


def test_the_record_is_what_came_before():
  records = made_up.chains([1, 1, 1, 1], [4, 0, 8, 2], 8, [0, 0, 0, 1])
  recent = predictor.recent_accepted(records, prior=2.0, keep=0.5)
  np.testing.assert_allclose(recent, [2.0, 3.0, 1.5, 2.0])


def test_the_bandit_learns_a_request():
  rng = np.random.default_rng(0)
  records = made_up.chains(
    rng.uniform(1, 2, 400), np.full(400, 8), 8, np.zeros(400)
  )
  arms = make_arms(records)
  start = np.ones((8, len(arms.arms)))  # calibrated: nothing is accepted
  start[:, arms.arms.index((8, 8))] = 1.5
  picked = predictor.bandit_choices(
    records, arms, np.zeros(400, int), arms.times(COSTS), start=start, rate=1.0
  )
  times = arms.times(COSTS)
  late = np.take_along_axis(arms.tokens, picked[:, None], 1)[200:].mean()
  early = np.take_along_axis(arms.tokens, picked[:, None], 1)[:20].mean()
  assert late >= early
  assert times.shape == (12,)
