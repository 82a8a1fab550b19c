# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unisparse_jax.speculative import drafters_for_tests
from unisparse_jax import speculative
from unisparse_jax.speculative import tree
from unisparse_jax.speculative.drafters import base


def random_pool(rng, batch, pool_size, empty=0.2):
  """Candidates with parents before children; many ties."""
  parents = np.full((batch, pool_size), -1)
  scores = np.zeros((batch, pool_size), np.float32)
  for b in range(batch):
    for i in range(pool_size):
      parents[b, i] = rng.integers(-1, i) if i else -1
      above = scores[b, parents[b, i]] if parents[b, i] >= 0 else 0.0
      step = rng.choice([0.0, 0.25, 1.0])
      scores[b, i] = max(above - step, tree.EMPTY)
      if rng.random() < empty:
        scores[b, i] = tree.EMPTY
  return tree.Pool(
    tokens=jnp.asarray(np.tile(np.arange(pool_size), (batch, 1)), jnp.int32),
    parents=jnp.asarray(parents, jnp.int32),
    scores=jnp.asarray(scores),
  )


def slow_tree(pool, row, max_nodes):
  """(pool index, parent, depth) of the nodes, by sorting in Python."""
  scores, parents = np.asarray(pool.scores)[row], np.asarray(pool.parents)[row]
  order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
  order = [i for i in order if scores[i] > tree.EMPTY / 2][: max_nodes - 1]
  rank = {i: n + 1 for n, i in enumerate(order)}
  nodes = [(None, 0, 0)]
  for i in order:
    parent = 0 if parents[i] < 0 else rank[parents[i]]
    nodes.append((i, parent, nodes[parent][2] + 1))
  return nodes


build = jax.jit(tree.build, static_argnames=("max_nodes", "max_depth"))


@pytest.mark.parametrize("seed", range(4))
def test_build_equals_sorting_in_python(seed):
  rng = np.random.default_rng(seed)
  pool = random_pool(rng, batch=5, pool_size=40)
  built = build(jnp.arange(5), pool, max_nodes=12, max_depth=40)
  for row in range(5):
    nodes = slow_tree(pool, row, 12)
    count = int(built.valid[row].sum())
    assert count == len(nodes) and built.valid[row, :count].all()
    assert int(built.tokens[row, 0]) == row
    above = np.zeros((count, count), bool)
    for n, (index, parent, depth) in enumerate(nodes):
      above[n] = above[parent]
      above[n, n] = True
      if n:
        assert int(built.tokens[row, n]) == index
      assert int(built.parents[row, n]) == parent
      assert int(built.depths[row, n]) == depth
    np.testing.assert_array_equal(built.ancestors[row, :count, :count], above)
    # Every prefix is closed under parents.
    assert all(parent < n for n, (_, parent, _) in enumerate(nodes) if n)


def test_a_larger_tree_than_the_pool_is_padded():
  pool = random_pool(np.random.default_rng(0), batch=1, pool_size=3, empty=0.0)
  built = build(jnp.zeros(1, jnp.int32), pool, max_nodes=8, max_depth=3)
  assert built.valid[0].tolist() == [True] * 4 + [False] * 4
  limited = built.limit(jnp.asarray([2]))
  assert int(limited.valid.sum()) == 2


@functools.partial(jax.jit, static_argnames="shape")
def draft(drafter, context, policy, shape):
  out = drafter.draft(
    None, (), context, shape=shape, policy=policy, policy_state=()
  )
  built = tree.build(
    context.root_tokens,
    out.pool,
    max_nodes=shape.max_nodes,
    max_depth=shape.max_depth,
  )
  return out, built


@pytest.fixture(scope="module")
def table():
  rng = np.random.default_rng(0)
  return rng.standard_normal((12, 12)).astype(np.float32) * 2.0


def context_of(tokens):
  tokens = jnp.asarray(tokens, jnp.int32)[:, None]
  return base.Context(
    tokens=tokens,
    lengths=jnp.ones(tokens.shape[0], jnp.int32),
    active=jnp.ones(tokens.shape[0], bool),
    step=jnp.int32(0),
  )


def slow_eagle(table, root, width, depth):
  """Pool of EAGLE-2: {path: log-probability}, and frontier with entropies."""
  log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
  frontier, pool = [((root,), 0.0, 0.0)], {}
  for _ in range(depth):
    children = []
    for path, score, entropy in frontier:
      top = np.argsort(-log_p[path[-1]], kind="stable")[:width]
      p = np.exp(log_p[path[-1], top])
      p /= p.sum()
      step = -(p * np.log(p)).sum()
      for token in top:
        child = (*path, int(token))
        pool[child] = score + log_p[path[-1], token]
        children.append((child, pool[child], entropy + step))
    frontier = sorted(children, key=lambda c: -c[1])[:width]
  return pool, frontier


def paths_of(built, row):
  paths = []
  for n in range(int(built.valid[row].sum())):
    token = int(built.tokens[row, n])
    parent = int(built.parents[row, n])
    paths.append((*paths[parent], token) if n else (token,))
  return paths


@pytest.mark.parametrize("unroll", [False, True])
def test_dynamic_tree_is_that_of_eagle_2(table, unroll):
  shape = speculative.TreeShape(
    width=3, base_depth=2, max_depth=4, buckets=(10,), unroll=unroll
  )
  policy = speculative.Fixed(depth=jnp.int32(4), nodes=jnp.int32(9))
  out, built = draft(
    drafters_for_tests.TableDrafter(table=jnp.asarray(table)),
    context_of([3, 7]),
    policy,
    shape,
  )
  assert int(out.levels) == 4
  for row, root in enumerate((3, 7)):
    pool, _ = slow_eagle(table, root, 3, 4)
    best = sorted(pool, key=lambda path: -pool[path])[:9]
    paths = paths_of(built, row)
    assert paths[1:] == best
    assert len({p for p in paths}) == len(paths)  # siblings are distinct
    np.testing.assert_allclose(
      built.scores[row, 1:], [pool[p] for p in best], rtol=1e-5
    )
    # The entropy is read after base_depth levels.
    _, frontier = slow_eagle(table, root, 3, 2)
    np.testing.assert_allclose(out.entropy[row], frontier[0][2], rtol=1e-5)


def test_rows_stop_at_their_own_depth(table):
  shape = speculative.TreeShape(
    width=3, base_depth=2, max_depth=4, buckets=(16,)
  )
  entropies = [slow_eagle(table, root, 3, 2)[1][0][2] for root in (3, 7)]
  split = (min(entropies) + max(entropies)) / 2
  policy = speculative.HeteroSpec.create(
    thresholds=[split] + [np.inf] * 6,
    depth=[3, 1] + [2] * 6,
    nodes=[15] * 8,
    base_depth=2,
    width=3,
  )
  out, built = draft(
    drafters_for_tests.TableDrafter(table=jnp.asarray(table)),
    context_of([3, 7]),
    policy,
    shape,
  )
  assert int(out.levels) == 3  # no row asks for level 4
  deepest = [max(len(p) - 1 for p in paths_of(built, row)) for row in range(2)]
  expected = [3 if e <= split else 1 for e in entropies]
  assert deepest == expected == np.asarray(out.decision.depth).tolist()


def test_literal_best_path_is_by_its_last_token(table):
  shape = speculative.TreeShape(width=3, base_depth=3, buckets=(4,))
  policy = speculative.HeteroSpec.create(
    thresholds=np.arange(1.0, 8.0),
    depth=[3] * 8,
    nodes=[3] * 8,
    base_depth=3,
    width=3,
    path_choice="last",
  )
  out, _ = draft(
    drafters_for_tests.TableDrafter(table=jnp.asarray(table)),
    context_of(range(12)),
    policy,
    shape,
  )
  differs = 0
  for root in range(12):
    pool, frontier = slow_eagle(table, root, 3, 3)
    last = [pool[path] - pool[path[:-1]] for path, _, _ in frontier]
    expected = frontier[int(np.argmax(last))]
    differs += expected is not frontier[0]
    np.testing.assert_allclose(out.entropy[root], expected[2], rtol=1e-5)
    np.testing.assert_allclose(out.score[root], expected[1], rtol=1e-5)
  assert differs > 0  # else the two readings cannot be told apart


def test_static_tree(table):
  levels = (((0, 0), (0, 2)), ((0, 0), (0, 1), (1, 2)), ((2, 0),))
  shape = speculative.TreeShape(
    width=3, base_depth=3, buckets=(1, 7), static_levels=levels
  )
  policy = speculative.Fixed(depth=jnp.int32(3), nodes=jnp.int32(6))
  _, built = draft(
    drafters_for_tests.TableDrafter(table=jnp.asarray(table)),
    context_of([5]),
    policy,
    shape,
  )
  order = np.argsort(-table, axis=-1, kind="stable")
  expected = [(5,)]
  above = [(5,)]
  for level in levels:
    above = [(*above[p], int(order[above[p][-1], rank])) for p, rank in level]
    expected += above
  assert paths_of(built, 0) == expected


def test_entropy_at_the_edges():
  uniform = jnp.log(jnp.full((4,), 0.1))
  certain = jnp.asarray([0.0, tree.EMPTY, tree.EMPTY, tree.EMPTY])
  nothing = jnp.full((4,), -jnp.inf)
  np.testing.assert_allclose(base.top_entropy(uniform), np.log(4), rtol=1e-6)
  assert float(base.top_entropy(certain)) == 0.0
  assert not np.isnan(base.top_entropy(nothing))
  _, log_p = base.top_children(jnp.asarray([1e4, 0.0, 0.0]), 2)
  assert (log_p <= 0).all() and log_p[0] == 0.0


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (dict(buckets=()), "^buckets must not be empty"),
    (dict(buckets=(8, 4)), "^buckets must be strictly increasing"),
    (dict(packed=(8, 8)), "^packed must be strictly increasing"),
    (dict(base_depth=4, max_depth=3), "^max_depth must be at least base_depth"),
    (dict(width=0), "^width must be an integer >= 1"),
    (
      dict(width=2, base_depth=1, static_levels=(((0, 2),),)),
      "^static_levels must name nodes",
    ),
    (
      dict(width=2, base_depth=2, static_levels=(((0, 1),),)),
      "^static_levels must have base_depth",
    ),
  ],
)
def test_bad_shapes(kwargs, message):
  with pytest.raises(ValueError, match=message):
    speculative.TreeShape(**kwargs)
