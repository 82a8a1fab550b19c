# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unisparse_jax.speculative import tree_test
from unisparse_jax import speculative
from unisparse_jax.speculative import tree
from unisparse_jax.speculative.drafters import base

CAPACITY = 40


def context_of(rows, capacity=CAPACITY):
  """Rows of known tokens, in a buffer that is full of junk behind them."""
  buffer = np.full((len(rows), capacity), 7, np.int32)
  for row, tokens in enumerate(rows):
    buffer[row, : len(tokens)] = tokens
  return base.Context(
    tokens=jnp.asarray(buffer),
    lengths=jnp.asarray([len(r) for r in rows], jnp.int32),
    active=jnp.ones(len(rows), bool),
    step=jnp.int32(0),
  )


@functools.partial(jax.jit, static_argnames="shape")
def draft(drafter, context, shape):
  policy = speculative.Fixed(
    depth=jnp.int32(shape.max_depth), nodes=jnp.int32(shape.max_nodes - 1)
  )
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


def slow_prompt_lookup(tokens, max_match, min_match, depth):
  """What followed the latest of the longest matches, in Python."""
  best = None
  for end in range(len(tokens) - 1):
    run = 0
    while run < max_match and run <= end:
      if tokens[end - run] != tokens[len(tokens) - 1 - run]:
        break
      run += 1
    if run >= min_match and (best is None or run >= best[0]):
      best = (run, end)
  return [] if best is None else tokens[best[1] + 1 :][:depth]


@pytest.mark.parametrize(("max_match", "min_match"), [(3, 1), (4, 2)])
def test_prompt_lookup_equals_search_in_python(max_match, min_match):
  rng = np.random.default_rng(0)
  rows = [rng.integers(0, 3, n).tolist() for n in (1, 2, 5, 9, 17, 30, 30, 30)]
  rows.append([0, 1, 2])  # no match
  shape = speculative.TreeShape(width=1, base_depth=4, buckets=(1, 5))
  drafter = speculative.PromptLookup(max_match=max_match, min_match=min_match)
  _, built = draft(drafter, context_of(rows), shape)
  lengths = set()
  for row, tokens in enumerate(rows):
    expected = slow_prompt_lookup(tokens, max_match, min_match, 4)
    paths = tree_test.paths_of(built, row)
    longest = max(paths, key=len)
    assert list(longest[1:]) == expected and len(paths) == len(expected) + 1
    lengths.add(len(expected))
  assert {0, 4} <= lengths


def slow_suffix(drafter, texts, tokens, depth):
  """{path: probability} and the matches, in Python."""
  matches = []
  for source, text in enumerate(texts):
    found = []
    for end in range(len(text) - 1):
      run = 0
      while run < drafter.max_match and run <= end and run < len(tokens):
        if text[end - run] != tokens[len(tokens) - 1 - run]:
          break
        run += 1
      if run >= drafter.min_match:
        found.append((run, end, source))
    matches += sorted(found, reverse=True)[: drafter.num_matches]
  matches.sort(key=lambda m: -m[0])
  matches = matches[: drafter.num_matches]
  top = max((m[0] for m in matches), default=0)
  votes, total = {}, 0.0
  for run, end, source in matches:
    weight = np.exp((run - top) * drafter.sharpness)
    total += weight
    reach = int(drafter.length_factor * run + drafter.length_offset)
    after = texts[source][end + 1 :][: min(depth, reach)]
    for n in range(1, len(after) + 1):
      path = tuple(after[:n])
      votes[path] = votes.get(path, 0.0) + weight
  kept = {
    path: mass / total * drafter.keep_rate ** len(path)
    for path, mass in votes.items()
  }
  return {k: v for k, v in kept.items() if v >= drafter.min_probability}, votes


@pytest.mark.parametrize("with_corpus", [False, True])
def test_suffix_match_equals_counting_in_python(with_corpus):
  rng = np.random.default_rng(1)
  corpus = rng.integers(0, 3, 50)
  drafter = speculative.SuffixMatch(
    corpus=jnp.asarray(corpus, jnp.int32) if with_corpus else None,
    max_match=5,
    num_matches=8,
    length_factor=1.0,
    length_offset=1,
    min_probability=0.03,
  )
  shape = speculative.TreeShape(
    width=2, base_depth=2, max_depth=4, buckets=(33,)
  )
  rows = [rng.integers(0, 3, n).tolist() for n in (1, 6, 13, 30, 38)]
  out, built = draft(drafter, context_of(rows), shape)
  for row, tokens in enumerate(rows):
    texts = [tokens, corpus.tolist()] if with_corpus else [tokens]
    expected, votes = slow_suffix(drafter, texts, tokens, 4)
    paths = tree_test.paths_of(built, row)
    assert {p[1:] for p in paths[1:]} == set(expected)
    for n, path in enumerate(paths[1:], start=1):
      np.testing.assert_allclose(
        np.exp(built.scores[row, n]), expected[path[1:]], rtol=1e-4
      )
    two = [p for p in expected if len(p) == 2]
    if not two:
      continue
    # Entropy of the votes along the best path of base_depth tokens.
    best = max(expected[p] for p in two)
    entropies = []
    for path in (p for p in two if expected[p] > best * (1 - 1e-5)):
      entropy = 0.0
      for n in range(2):
        shares = np.asarray(
          [
            mass
            for p, mass in votes.items()
            if len(p) == n + 1 and p[:n] == path[:n]
          ]
        )
        parent = votes[path[:n]] if n else None
        parent = shares.sum() if parent is None else parent
        entropy -= (shares / parent * np.log(shares / parent)).sum()
      entropies.append(entropy)
    assert np.abs(np.asarray(entropies) - float(out.entropy[row])).min() < 0.3
    assert not np.isnan(out.entropy).any()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: speculative.PromptLookup(min_match=0),
      "^min_match must be an",
    ),
    (
      lambda: speculative.PromptLookup(max_match=1, min_match=2),
      "^max_match must be at least min_match",
    ),
    (lambda: speculative.PromptLookup(keep_rate=0.0), "^keep_rate must be in"),
    (lambda: speculative.SuffixMatch(num_matches=0), "^num_matches must be an"),
  ],
)
def test_bad_settings(make, message):
  with pytest.raises(ValueError, match=message):
    make()
