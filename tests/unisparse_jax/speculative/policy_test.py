# SPDX-License-Identifier: Apache-2.0
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


def test_gate_waits_and_probes():
  policy = speculative.Gated(
    policy=speculative.Fixed(depth=4, nodes=8),
    min_tokens=1.5,
    period=3,
    decay=0.5,
  )
  state = policy.init_state(2)
  drafted = []
  for step in range(14):
    wants = bool(policy.should_draft(state, None))
    drafted.append(wants)
    accept = 0 if step < 8 else 3
    rows = jnp.asarray([accept, 7], jnp.int32)  # the second row is done
    state = policy.update(
      state,
      speculative.Outcome(
        decision=policy.decide(state, evidence([0.0, 0.0])),
        evidence_entropy=jnp.zeros(2),
        accept_len=rows,
        num_emitted=rows + 1,
        bucket=jnp.int32(0),
        draft_levels=jnp.int32(4 if wants else 0),
        active=jnp.asarray([True, False]),
      ),
    )
  # The mean starts at 3: 2, 1.5, 1.25; then every fourth step is a probe,
  # until step 11 brings 4 tokens.
  assert drafted == [True] * 3 + [False] * 3 + [True] + [False] * 3 + [True] * 4


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
