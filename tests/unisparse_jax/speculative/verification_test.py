# SPDX-License-Identifier: Apache-2.0
"""The accepted path against a walk, and distributions against enumeration."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.unisparse_jax.speculative import (
  conftest,
  drafters_for_tests,
  tree_test,
)
from unisparse_jax import models, speculative
from unisparse_jax.speculative import tree, verification

VOCAB, HORIZON = 5, 3


def p_value(samples, probabilities):
  """Chi-square test of counts; cells that expect fewer than 5 are pooled."""
  counts = np.bincount(samples, minlength=len(probabilities))
  probabilities = np.asarray(probabilities, np.float64)
  expected = probabilities / probabilities.sum() * len(samples)
  if counts[expected == 0].any():
    return 0.0
  counts, expected = counts[expected > 0], expected[expected > 0]
  rare = expected < 5
  if rare.any():
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
  return stats.chisquare(counts, expected).pvalue


@pytest.mark.parametrize("seed", range(3))
def test_acceptance_equals_a_walk(seed):
  rng = np.random.default_rng(seed)
  pool = tree_test.random_pool(rng, batch=30, pool_size=24)
  # Distinct siblings of few tokens: rank among the siblings.
  parents = np.asarray(pool.parents)
  tokens = np.zeros_like(parents)
  for row in range(30):
    for i in range(24):
      tokens[row, i] = np.sum(parents[row, :i] == parents[row, i])
  pool = dataclasses.replace(pool, tokens=jnp.asarray(tokens, jnp.int32))
  built = tree_test.build(
    jnp.zeros(30, jnp.int32), pool, max_nodes=16, max_depth=24
  )
  built = built.limit(jnp.asarray(rng.integers(1, 17, 30), jnp.int32))
  targets = rng.integers(0, 3, (30, 16)).astype(np.int32)
  found = verification.accept_matches(built, jnp.asarray(targets), max_depth=20)
  lengths = set()
  for row in range(30):
    path = [0]
    while True:
      children = [
        n
        for n in range(1, 16)
        if built.valid[row, n]
        and int(built.parents[row, n]) == path[-1]
        and int(built.tokens[row, n]) == targets[row, path[-1]]
      ]
      if not children:
        break
      path += children
    lengths.add(len(path))
    assert int(found.accept_len[row]) == len(path) - 1
    assert found.path[row, : len(path)].tolist() == path
    assert (found.path[row, len(path) :] == path[-1]).all()
    np.testing.assert_array_equal(
      found.tokens[row, : len(path)], targets[row, path]
    )
  assert len(lengths) > 2


@pytest.fixture(scope="module")
def tiny():
  config = models.DecoderConfig(
    vocab_size=VOCAB,
    num_layers=1,
    embed_dim=8,
    mlp_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_len=16,
    tie_embeddings=False,
  )
  return conftest.make_model(3, config, factor=6.0)


_forward = jax.jit(lambda model, tokens: model(tokens))


def enumerate_sequences(model, prompt, sampler):
  """Probability of each of the VOCAB ** HORIZON continuations."""
  sequences = np.asarray(list(itertools.product(range(VOCAB), repeat=HORIZON)))
  rows = np.concatenate(
    [np.tile(prompt, (len(sequences), 1)), sequences], axis=1
  )
  logits, _ = _forward(model, rows.astype(np.int32))
  p = np.asarray(sampler.probabilities(logits), np.float64)
  first = len(prompt) - 1
  total = np.ones(len(sequences))
  for step in range(HORIZON):
    total *= p[np.arange(len(sequences)), first + step, sequences[:, step]]
  return total


def test_sampled_sequences_have_the_enumerated_distribution(tiny):
  sampler = models.TopK(top_k=4, temperature=1.3)
  prompt, rows = np.asarray([1, 4]), 50_000
  exact = enumerate_sequences(tiny, prompt, sampler)
  np.testing.assert_allclose(exact.sum(), 1.0, rtol=1e-5)
  table = jnp.asarray(
    np.random.default_rng(0).standard_normal((VOCAB, VOCAB)), jnp.float32
  )
  shape = speculative.TreeShape(width=2, base_depth=2, buckets=(5,))
  values, accepted = [], 0.0
  for seed in range(5):
    result = speculative.generate(
      tiny,
      drafters_for_tests.TableDrafter(table=table),
      np.tile(prompt, (rows, 1)),
      max_new_tokens=HORIZON,
      shape=shape,
      sampler=sampler,
      rng_key=jax.random.key(seed),
      capacity=8,
    )
    tokens = np.asarray(result.tokens)
    index = tokens @ (VOCAB ** np.arange(HORIZON)[::-1])
    values.append(p_value(index, exact))
    accepted += speculative.summarize(result.log)["accept_len"] / 5
  assert min(values) > 1e-3, values
  assert accepted > 0.2  # drafts do take part
  # The test can fail: the same samples under another temperature.
  wrong = enumerate_sequences(
    tiny, prompt, models.TopK(top_k=4, temperature=0.9)
  )
  assert p_value(index, np.where(exact > 0, wrong, 0.0)) < 1e-6


def test_drawn_chains_have_the_enumerated_distribution(tiny):
  sampler = models.TopK(top_k=4, temperature=1.3)
  prompt, rows = np.asarray([1, 4]), 50_000
  exact = enumerate_sequences(tiny, prompt, sampler)
  other = conftest.make_model(5, tiny.config, factor=6.0)
  result = speculative.generate(
    tiny,
    speculative.SampledChain(model=other, sampler=models.Temperature()),
    np.tile(prompt, (rows, 1)),
    max_new_tokens=HORIZON,
    shape=speculative.TreeShape(width=1, base_depth=2, buckets=(3,)),
    sampler=sampler,
    rng_key=jax.random.key(0),
    capacity=8,
  )
  tokens = np.asarray(result.tokens)
  index = tokens @ (VOCAB ** np.arange(HORIZON)[::-1])
  assert p_value(index, exact) > 1e-3
  accepted = speculative.summarize(result.log)["accept_len"]
  assert 0.5 < accepted < 1.9
  # The drafter's own distribution is another one.
  wrong = enumerate_sequences(other, prompt, models.Temperature())
  assert p_value(index, wrong) < 1e-6


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (dict(sampler=models.Greedy()), "^sampler must draw at random where"),
    (
      dict(shape=speculative.TreeShape(width=2, base_depth=1, buckets=(3,))),
      "^shape must be a chain of one depth",
    ),
    (
      dict(
        policy=speculative.Gated(
          policy=speculative.Fixed(depth=1, nodes=1), step_cost=1.0
        )
      ),
      "^policy must be Fixed where drafts",
    ),
  ],
)
def test_what_drawn_chains_cannot_do(tiny, kwargs, message):
  shape = speculative.TreeShape(width=1, base_depth=1, buckets=(2,))
  kwargs = dict(shape=shape, sampler=models.Temperature()) | kwargs
  with pytest.raises(ValueError, match=message):
    speculative.generate(
      tiny,
      speculative.SampledChain(model=tiny, sampler=models.Temperature()),
      np.asarray([[1, 2]]),
      max_new_tokens=2,
      rng_key=jax.random.key(0),
      **kwargs,
    )


def two_level_draft(rng_key, q, rows):
  """Root, two children drawn from q[0], and one below each of those."""
  keys = jax.random.split(rng_key, 2)
  children = jax.random.categorical(
    keys[0], jnp.log(q[0]), shape=(rows, 2)
  ).astype(jnp.int32)
  below = jax.random.categorical(keys[1], jnp.log(q[children]))
  tokens = jnp.concatenate(
    [jnp.zeros((rows, 1), jnp.int32), children, below.astype(jnp.int32)],
    axis=1,
  )
  parents = jnp.broadcast_to(
    jnp.asarray([[0, 0, 0, 1, 2]], jnp.int32), (rows, 5)
  )
  return tree.DraftTree(
    tokens=tokens,
    parents=parents,
    depths=jnp.zeros_like(parents),
    scores=jnp.zeros(parents.shape),
    valid=jnp.ones(parents.shape, bool),
    ancestors=jnp.zeros((rows, 5, 5), bool),
  )


reject = jax.jit(verification.accept_by_rejection, static_argnames="max_depth")


@pytest.mark.parametrize("is_drawn", [True, False])
def test_recursive_rejection_has_the_target_distribution(is_drawn):
  rng, rows = np.random.default_rng(0), 50_000
  # Next-token distributions by last token, of target and drafter.
  p, q = rng.dirichlet(np.ones(VOCAB), (2, VOCAB)).astype(np.float32)
  p, q = jnp.asarray(p), jnp.asarray(0.5 * p + 0.5 * q)
  draft = two_level_draft(jax.random.key(0), q, rows)
  if not is_drawn:  # the two best children of the root, the best below
    top = jnp.argsort(-q, axis=-1)
    tokens = draft.tokens.at[:, 1:3].set(top[0, :2])
    draft = dataclasses.replace(
      draft, tokens=tokens.at[:, 3:].set(top[tokens[:, 1:3], 0])
    )
  keys = jax.random.split(jax.random.key(1), rows)
  found = reject(
    draft,
    p[draft.tokens],
    q[draft.tokens] if is_drawn else None,
    keys,
    max_depth=2,
  )
  # Where one token came out, the next is drawn as plain sampling would.
  first = found.tokens[:, 0]
  second = jax.random.categorical(jax.random.key(2), jnp.log(p[first]))
  second = np.where(found.accept_len > 0, found.tokens[:, 1], second)
  exact = np.asarray(p[0][:, None] * p, np.float64).reshape(-1)
  index = np.asarray(first) * VOCAB + second
  assert p_value(index, exact) > 1e-3
  assert np.bincount(found.accept_len, minlength=3).min() > 1000
  assert p_value(index, np.asarray(q[0][:, None] * p).reshape(-1)) < 1e-6


def test_dropping_drawn_children_by_score_is_caught():
  # Design page, 4.3: p = (.5, .5), q = (.9, .1), drafts with q < .5 dropped.
  rows = 50_000
  p = jnp.asarray([0.5, 0.5])
  q = jnp.asarray([0.9, 0.1])
  token = jax.random.bernoulli(jax.random.key(0), 0.1, (rows,))
  token = token.astype(jnp.int32)
  parents = jnp.zeros((rows, 2), jnp.int32)

  def emitted(valid):
    draft = tree.DraftTree(
      tokens=jnp.stack([jnp.zeros_like(token), token], axis=1),
      parents=parents,
      depths=parents,
      scores=jnp.zeros((rows, 2)),
      valid=jnp.stack([jnp.ones((rows,), bool), valid], axis=1),
      ancestors=jnp.zeros((rows, 2, 2), bool),
    )

    def everywhere(x):
      return jnp.broadcast_to(x[None, None], (rows, 2, 2))

    keys = jax.random.split(jax.random.key(1), rows)
    found = reject(draft, everywhere(p), everywhere(q), keys, max_depth=1)
    return np.asarray(found.tokens[:, 0])

  assert p_value(emitted(jnp.ones((rows,), bool)), np.ones(2)) > 1e-3
  biased = emitted(token == 0)
  np.testing.assert_allclose(biased.mean(), 0.45, atol=0.01)
  assert p_value(biased, np.ones(2)) < 1e-6


def test_residual_of_equal_distributions():
  p = jnp.asarray([0.25, 0.75])
  np.testing.assert_allclose(verification.residual(p, p), p)
  np.testing.assert_allclose(
    verification.residual(p, jnp.asarray([0.75, 0.25])), [0.0, 1.0]
  )
