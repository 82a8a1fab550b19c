# SPDX-License-Identifier: Apache-2.0
"""The compiled policy decides as the replay does."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unisparse_jax.speculative.calibration import search_test
from unisparse_jax.speculative import policy, tree
from unisparse_jax.speculative.calibration import fit_thresholds, predictor


@pytest.fixture(scope="module")
def fitted():
  records, _ = search_test.two_kinds()
  arms = search_test.make_arms(records)
  thresholds = fit_thresholds(records.entropy, records.terminal_rank)
  return records, arms, predictor.fit(records, arms, thresholds)


def evidence(records, index):
  return types.SimpleNamespace(
    entropy=jnp.asarray(records.entropy[index]),
    score=jnp.asarray(records.score[index]),
  )


def outcome(accepted, active=None, levels=2, remaining=None):
  accepted = jnp.asarray(accepted, jnp.int32)
  if remaining is None:
    remaining = jnp.ones(accepted.shape, jnp.int32)
  if active is None:
    active = jnp.ones(accepted.shape, bool)
  return types.SimpleNamespace(
    accept_len=accepted,
    active=active,
    draft_levels=jnp.int32(levels),
    remaining=jnp.asarray(remaining, jnp.int32),
  )


def test_decides_as_the_replay(fitted):
  records, arms, model = fitted
  times = arms.times(search_test.COSTS)
  made = model.policy(
    arms, search_test.COSTS, rate=1.5, width=4, drafter_hash=None
  )
  made.check(tree.TreeShape(width=4, base_depth=2, max_depth=8, buckets=(9,)))
  picked = model.choose(records, times, 1.5)
  state = made.init_state(1)

  @jax.jit
  def step(made, state, entropy, score):
    seen = types.SimpleNamespace(entropy=entropy, score=score)
    return made.decide(state, seen)

  for i in range(10):  # one request, in order
    seen = evidence(records, slice(i, i + 1))
    decision = step(made, state, seen.entropy, seen.score)
    assert arms.arms[picked[i]] == (
      int(decision.depth[0]), int(decision.nodes[0])
    )  # fmt: skip
    state = made.update(state, outcome(records.accept_len[i : i + 1]))


def test_a_shared_batch_takes_one_arm(fitted):
  records, arms, model = fitted
  easy = int(np.argmin(records.entropy))
  hard = int(np.argmax(records.entropy))
  seen = evidence(records, np.array([easy, hard]))
  alone, shared = (
    model.policy(
      arms, search_test.COSTS, rate=1.5, width=4, drafter_hash=None, shared=s
    )
    for s in (False, True)
  )
  state = alone.init_state(2)
  nodes = alone.decide(state, seen).nodes
  assert int(nodes[0]) > int(nodes[1])
  together = shared.decide(state, seen)
  assert int(together.nodes[0]) == int(together.nodes[1])
  # A finished row has no say, nor has one that is nearly done; both steps
  # bring what the record expects.
  mean = [float(state.recent[0])] * 2
  for left in ([0, 50], [1, 500]):
    only_hard = shared.update(state, outcome(mean, remaining=left))
    assert int(shared.decide(only_hard, seen).nodes[0]) == int(nodes[1])
  only_easy = shared.update(state, outcome(mean, remaining=[500, 1]))
  assert int(shared.decide(only_easy, seen).nodes[0]) == int(nodes[0])


def test_the_record_moves_only_with_drafts(fitted):
  _, arms, model = fitted
  made = model.policy(
    arms, search_test.COSTS, rate=1.5, width=4, drafter_hash=None
  )
  state = made.init_state(2)
  new = made.update(state, outcome([8, 0], jnp.array([True, False])))
  assert float(new.recent[0]) > float(state.recent[0])
  assert float(new.recent[1]) == float(state.recent[1])
  same = made.update(state, outcome([8, 8], levels=0))
  np.testing.assert_array_equal(same.recent, state.recent)


def test_fits_its_shape_alone(fitted):
  _, arms, model = fitted
  made = model.policy(
    arms, search_test.COSTS, rate=1.5, width=4, drafter_hash=None
  )
  assert isinstance(made, policy.Policy)
  with pytest.raises(ValueError, match="width must be that of the tree"):
    made.check(tree.TreeShape(width=5, base_depth=2, max_depth=8, buckets=(9,)))
  with pytest.raises(ValueError, match="nodes must fit in the largest"):
    made.check(tree.TreeShape(width=4, base_depth=2, max_depth=8, buckets=(4,)))
