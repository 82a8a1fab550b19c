# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax import speculative
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree

SHAPE = speculative.TreeShape(width=10, base_depth=8, max_depth=12)
THRESHOLDS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def evidence(entropies):
  batch = len(entropies)
  return policy_lib.Evidence(
    entropy=jnp.asarray(entropies, jnp.float32),
    score=jnp.zeros(batch),
    frontier_tokens=jnp.zeros((batch, 1), jnp.int32),
    frontier_pool_index=jnp.zeros((batch, 1), jnp.int32),
    pool=tree.Pool(
      tokens=jnp.zeros((batch, 1), jnp.int32),
      parents=jnp.full((batch, 1), -1),
      scores=jnp.zeros((batch, 1)),
    ),
    lengths=jnp.ones(batch, jnp.int32),
  )


def test_the_papers_rule():
  # Design page, 1.4: d = 8, 60 nodes, alpha = 4.
  policy = speculative.HeteroSpec.from_rule(
    thresholds=THRESHOLDS, base_depth=8, base_nodes=60, width=10
  )
  assert policy.depth.tolist() == [12, 11, 10, 8, 8, 8, 8, 8]
  assert policy.nodes.tolist() == [22, 39, 62, 60, 60, 60, 60, 60]
  policy.check(SHAPE)
  other = speculative.HeteroSpec.from_rule(
    thresholds=THRESHOLDS, base_depth=8, base_nodes=60, width=10, first_bin=1
  )
  assert other.depth[:3].tolist() == [11, 10, 9]
  assert other.nodes[:3].tolist() == [21, 38, 61]


def test_bins_are_monotone_and_closed_on_the_right():
  policy = speculative.HeteroSpec.from_rule(
    thresholds=[*THRESHOLDS[:5], np.inf, np.inf],
    base_depth=8,
    base_nodes=60,
    width=10,
  )
  entropies = [0.0, 1.0, 1.1, 2.0, 4.5, 5.5, 100.0]
  decision = policy.decide((), evidence(entropies))
  assert decision.bin.tolist() == [0, 0, 1, 1, 4, 5, 5]
  assert decision.depth.tolist() == [12, 12, 11, 11, 8, 8, 8]


def outcome_of(
  policy, state, brought, remaining, *, steps=1, drafted=True, active=True
):
  """Of a step that drafts 4 levels, or of plain ones."""
  rows = len(remaining)
  accepted = np.maximum(np.asarray(brought) - 1, 0) * drafted
  return speculative.Outcome(
    decision=policy.decide(state, evidence([0.0] * rows)),
    evidence_entropy=jnp.zeros(rows),
    accept_len=jnp.asarray(accepted, jnp.int32),
    num_emitted=jnp.asarray(brought, jnp.int32),
    bucket=jnp.int32(0),
    draft_levels=jnp.int32(4 * drafted),
    active=jnp.broadcast_to(jnp.asarray(active), rows),
    remaining=jnp.asarray(remaining, jnp.int32),
    steps=jnp.int32(steps),
  )


def gate_steps(policy, tokens, remaining, num_steps):
  """Which of num_steps steps draft; rows bring tokens(step) if they do."""
  remaining = np.asarray(remaining)
  state = policy.init_state(len(remaining))
  update = jax.jit(policy.update)
  drafted = []
  for step in range(num_steps):
    wants = int(policy.plain_steps(state, None)) == 0
    drafted.append(wants)
    active = remaining > 0
    brought = np.where(active, tokens(step) if wants else 1, 0)
    remaining = np.maximum(remaining - brought, 0)
    state = update(
      state,
      outcome_of(
        policy, state, brought, remaining, drafted=wants, active=active
      ),
    )
  return drafted


def gate(**settings):
  return speculative.Gated(
    policy=speculative.Fixed(depth=4, nodes=8), **settings
  )


def test_gate_waits_longer_and_looks():
  # A step costs 1 + 4 / 4 plain ones. One token of a row loses one step each
  # time, once its rate is no longer the prior's.
  policy = gate(step_cost=1.0, level_cost=0.25, period=3)
  drafted = gate_steps(policy, lambda _: 1, [500, 0], 40)
  first = drafted.index(False)
  assert 3 <= first <= 8
  stretches = "".join("d" if d else "." for d in drafted[first:]).split("d")
  waits = [len(s) for s in stretches if s]
  assert waits[:3] == [3, 6, 12]
  # Where it pays again, it stays, and the next stretch is a short one.

  def late(step):
    return 6 if 10 <= step < 60 else 1

  drafted = gate_steps(policy, late, [500, 0], 120)
  assert all(drafted[25:60])
  again = drafted.index(False, 60)
  assert drafted[again : again + 4] == [False] * 3 + [True]


def test_gate_counts_what_a_step_cost():
  # Two tokens a step pay at 1.5 plain steps, not at 2.5.
  for levels, pays in ((0.125, True), (0.375, False)):
    policy = gate(step_cost=1.0, level_cost=levels, period=20)
    drafted = gate_steps(policy, lambda _: 2, [400], 60)
    assert all(drafted) == pays


def test_gate_asks_for_the_row_that_ends_last():
  policy = gate(step_cost=2.0, period=20)
  mixed = np.asarray([6, 6, 6, 1])
  # The row of one token a step is far behind: drafting only delays it.
  assert not all(gate_steps(policy, lambda _: mixed, [40, 40, 40, 300], 40))
  # It is nearly done, and the others are not.
  assert all(gate_steps(policy, lambda _: mixed, [300, 300, 300, 20], 40))


def test_gate_takes_bad_luck_of_some_row_for_luck():
  # Of 64 rows some always had a bad start. All are alike here, and it pays.
  rng = np.random.default_rng(0)
  brought = rng.choice([1, 1, 6, 12], size=(200, 64))
  policy = gate(step_cost=2.5)
  assert all(gate_steps(policy, lambda i: brought[i], [400] * 64, 60))
  # Where it does not, so many rows tell at once.
  poor = np.minimum(brought, 3)
  assert gate_steps(policy, lambda i: poor[i], [400] * 64, 60).index(False) <= 5


def test_gate_does_not_stay_open_near_break_even():
  # One row of 16 brings 1.75 tokens a step, which cost 1.86 plain ones.
  means = np.asarray([2.6] * 15 + [1.75])
  policy = gate(step_cost=1.86, period=20)
  for seed in range(5):
    rng = np.random.default_rng(seed)
    brought = np.minimum(rng.geometric(1 / means, size=(40, 16)), 8)
    drafted = gate_steps(
      policy, lambda i, rows=brought: rows[i], [250] * 16, 40
    )
    assert drafted.index(False) <= 20


def test_gate_takes_no_look_late_in_a_batch():
  policy = gate(step_cost=3.0, period=20)
  drafted = gate_steps(policy, lambda _: 1, [40, 30], 40)
  first = drafted.index(False)
  assert 0 < 40 - (first + 20) <= 20  # left behind the first stretch
  assert not any(drafted[first:])
  # With more to come, or one row, there are looks.
  assert any(gate_steps(policy, lambda _: 1, [200, 30], 60)[first:])
  drafted = gate_steps(policy, lambda _: 1, [40], 40)
  assert any(drafted[drafted.index(False) :])


def test_gate_that_closes_late_takes_all_that_is_left_at_once():
  policy = gate(step_cost=3.0, period=20)
  update = jax.jit(policy.update)
  for left, is_one in ((42, True), (50, False)):
    state = policy.init_state(2)
    while not (wait := int(policy.plain_steps(state, None))):
      left -= 1
      state = update(state, outcome_of(policy, state, [1, 1], [left, 30]))
    assert wait == (60 if is_one else 20)


def test_gate_hears_of_a_stretch_at_once():
  policy = gate(step_cost=3.0, period=20)
  one_by_one = gate_steps(policy, lambda _: 1, [400], 40)
  state = policy.init_state(1)
  drafted, remaining = [], 400
  while len(drafted) < 40:
    wait = int(policy.plain_steps(state, None))
    steps = min(max(wait, 1), 8)
    drafted += [wait == 0] * steps
    remaining -= steps
    state = policy.update(
      state,
      outcome_of(
        policy, state, [steps], [remaining], steps=steps, drafted=wait == 0
      ),
    )
  assert drafted[:40] == one_by_one and not all(one_by_one)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(thresholds=[1, 2, 2, 3, 4, 5, 6]), "^thresholds must be increasing"),
    (dict(thresholds=[1, 2, 3, np.nan, 4, 5, 6]), "^thresholds must be incr"),
    (dict(thresholds=[1, 2, 3]), "^thresholds must have shape"),
    (dict(depth=[0] * 8), "^depth must hold integers >= 1"),
    (dict(nodes=[-1] * 8), "^nodes must hold integers >= 0"),
    (dict(nodes=[1.5] * 8), "^nodes must hold integers >= 0"),
    (dict(path_choice="best"), "^path_choice must be a known name"),
  ],
)
def test_bad_tables(change, message):
  good = dict(
    thresholds=THRESHOLDS,
    depth=[8] * 8,
    nodes=[60] * 8,
    base_depth=8,
    width=10,
  )
  with pytest.raises(ValueError, match=message):
    speculative.HeteroSpec.create(**{**good, **change})


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(depth=[13] * 8), "^depth must be at most max_depth"),
    (dict(nodes=[64] * 8), "^nodes must fit in the largest bucket"),
    (dict(base_depth=7), "^base_depth must be that of the tree's shape"),
    (dict(width=9), "^width must be that of the tree's shape"),
  ],
)
def test_tables_for_another_shape(change, message):
  table = dict(
    thresholds=THRESHOLDS,
    depth=[8] * 8,
    nodes=[60] * 8,
    base_depth=8,
    width=10,
  )
  policy = speculative.HeteroSpec.create(**{**table, **change})
  with pytest.raises(ValueError, match=message):
    policy.check(SHAPE)
