# SPDX-License-Identifier: Apache-2.0
"""Copies where the text repeats itself, a model's drafts where it does not."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.unisparse_jax.speculative import (
  drafters_for_tests,
  engine_test,
  lookup_test,
  tree_test,
)
from tests.unisparse_jax.speculative.drafters import eagle_test
from unisparse_jax import models, speculative
from unisparse_jax.speculative import engine, policy, tree
from unisparse_jax.speculative.drafters import base, combined, eagle

NEW = 20
SHAPE = tree.TreeShape(width=2, base_depth=2, max_depth=6, buckets=(1, 8))
# The model's levels end before the lookup's.
DEPTH = 3
LOOKUP_NODES = 6
POLICIES = {
  "fixed": lambda: policy.Fixed(depth=jnp.int32(3), nodes=jnp.int32(7)),
  "heterospec": lambda: policy.HeteroSpec.create(
    thresholds=(0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5),
    depth=[3, 3, 2, 2, 2, 1, 1, 1],
    nodes=[7, 6, 5, 4, 3, 2, 1, 0],
    base_depth=2,
    width=2,
  ),
  "gated": lambda: speculative.Gated(
    policy=policy.Fixed(depth=3, nodes=7), step_cost=1.9, period=3, look=0.0
  ),
}


def make(drafter, lookup=speculative.SuffixMatch(), **kwargs):
  kwargs = dict(drafter_depth=DEPTH, lookup_nodes=LOOKUP_NODES) | kwargs
  return combined.LookupFirst(lookup=lookup, drafter=drafter, **kwargs)


@pytest.fixture(scope="module")
def eagle_pair():
  target, head = eagle_test.make()
  return target, eagle.Eagle(head=head)


@pytest.fixture(scope="module")
def prompts():
  """Four rows: two repeat themselves."""
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 24, (4, 12))
  rows[1] = np.tile(rows[1, :4], 3)
  rows[2] = np.tile(rows[2, :3], 4)
  return rows.astype(np.int32)


LENGTHS = np.asarray([12, 12, 10, 7], np.int32)


def generate(target, drafter, prompts, kind, **kwargs):
  kwargs = dict(max_new_tokens=NEW, shape=SHAPE) | kwargs
  return speculative.generate(
    target, drafter, prompts, policy=POLICIES[kind](), **kwargs
  )


@pytest.mark.parametrize("kind", list(POLICIES))
def test_a_batch_gets_the_plain_output(eagle_pair, prompts, kind):
  target, head = eagle_pair
  plain = models.generate(
    target, prompts, max_new_tokens=NEW, lengths=LENGTHS, eos_id=3
  )
  # One of them shares its verified nodes between the rows.
  packed = (4, 16) if kind == "heterospec" else ()
  result = generate(
    target, make(head), prompts, kind, lengths=LENGTHS, eos_id=3,
    shape=dataclasses.replace(SHAPE, packed=packed), log_trees=True,
  )  # fmt: skip
  np.testing.assert_array_equal(result.tokens, plain)
  levels = result.log.column("draft_levels").max(axis=1)
  took = result.log.column("num_emitted") > 0
  nodes = result.log.column("nodes")
  # Some steps skipped the model and still verified a draft; some did not.
  assert np.any((levels == 0)[:, None] & took & (nodes > 1))
  assert np.any(levels > 0) and levels.max() <= DEPTH
  engine_test.check_tree_log(result.log)


@pytest.mark.parametrize("rows", [1, 4])
def test_sampling_gets_the_plain_output(target, other_model, prompts, rows):
  sampler = models.TopP(top_p=0.9, temperature=1.5)
  key = jax.random.key(3)
  drafter = make(
    speculative.SmallDecoder(model=other_model),
    speculative.PromptLookup(max_match=8),
    model_cost=1.2,
  )
  prompts, lengths = prompts[:rows], LENGTHS[:rows]
  how = dict(lengths=lengths, sampler=sampler, rng_key=key)
  plain = models.generate(target, prompts, max_new_tokens=NEW, **how)
  assert len(np.unique(plain)) > 8
  result = generate(target, drafter, prompts, "fixed", **how)
  np.testing.assert_array_equal(result.tokens, plain)
  np.testing.assert_array_equal(
    result.log.column("num_emitted").clip(0).sum(axis=0), NEW - 1
  )


def test_one_row_goes_from_the_model_to_the_lookup(eagle_pair, prompts):
  target, head = eagle_pair
  drafter = make(head, min_match=3)
  tokens = prompts[:1]
  plain = models.generate(target, tokens, max_new_tokens=NEW)
  session = speculative.prepare(
    target, drafter, tokens, max_new_tokens=NEW, shape=SHAPE,
    policy=POLICIES["fixed"](),
  )  # fmt: skip
  programs = engine.decode._cache_size()
  session.run()
  result = session.result()
  np.testing.assert_array_equal(result.tokens, plain)
  # What was copied is what had been written: the text repeats itself there.
  levels = result.log.column("draft_levels")[:, 0]
  emitted = result.log.column("num_emitted")[:, 0]
  starts = len(tokens[0]) + 1 + np.cumsum(emitted) - emitted
  text = [*tokens[0].tolist(), *np.asarray(plain)[0].tolist()]
  repeats = [
    bool(lookup_test.slow_prompt_lookup(text[:n], 16, 3, 1)) for n in starts
  ]
  assert levels[0] > 0 and (levels == 0).any()
  assert all(r for r, level in zip(repeats, levels, strict=True) if level == 0)
  assert emitted[levels == 0].max() > DEPTH + 1

  # The head's state is that of a prompt of all known tokens.
  known = int(session.state.lengths[0])
  fresh = speculative.prepare(
    target, drafter, np.asarray([text[: known - 1]], np.int32),
    max_new_tokens=1, shape=SHAPE, policy=POLICIES["fixed"](),
  ).state.drafter_state.inner  # fmt: skip
  ours = session.state.drafter_state.inner
  np.testing.assert_array_equal(ours.lengths, [known - 1])
  np.testing.assert_allclose(ours.out, fresh.out, atol=1e-4)
  for mine, theirs in ((ours.k, fresh.k), (ours.v, fresh.v)):
    np.testing.assert_allclose(
      mine[:, :, : known - 1], theirs[:, :, : known - 1], atol=1e-4
    )

  # Costs are data.
  other = dataclasses.replace(drafter, model_cost=1.1, decay=0.5, drift=0.0)
  generate(target, other, tokens, "fixed")
  assert engine.decode._cache_size() == programs + 1


@functools.partial(jax.jit, static_argnames="shape")
def draft(drafter, state, context, shape):
  return drafter.draft(
    None, state, context, shape=shape,
    policy=policy.Fixed(depth=jnp.int32(3), nodes=jnp.int32(7)),
    policy_state=(),
  )  # fmt: skip


def paths(made, context, row):
  built = tree.build(
    context.root_tokens, made.pool, max_nodes=8, max_depth=SHAPE.max_depth
  )
  return {p[1:] for p in tree_test.paths_of(built, row)}


REPEATS, FRESH = [*range(5)] * 3, list(range(14, -1, -1))


@pytest.fixture(scope="module")
def table():
  rng = np.random.default_rng(4)
  return drafters_for_tests.TableDrafter(
    table=jnp.asarray(rng.normal(size=(24, 24)), jnp.float32)
  )


@pytest.mark.parametrize("min_match", [1, 11])
def test_every_row_gets_the_draft_that_promises_more(table, min_match):
  lookup = speculative.PromptLookup(max_match=16)
  drafter = make(table, lookup, min_match=min_match, model_cost=1.5)
  for rows in ([REPEATS, REPEATS], [FRESH, FRESH], [REPEATS, FRESH]):
    context = lookup_test.context_of(rows)
    state = drafter.init(None, batch=2, capacity=40)
    got = draft(drafter, state, context, SHAPE)
    inner = dataclasses.replace(SHAPE, max_depth=DEPTH)
    levels = draft(table, (), context, inner)
    is_copy = [row is REPEATS and min_match == 1 for row in rows]
    for row, copies in enumerate(is_copy):
      if copies:
        full = lookup_test.slow_prompt_lookup(REPEATS, 16, 1, SHAPE.max_depth)
        assert len(full) > DEPTH
        assert paths(got, context, row) == {
          tuple(full[:n]) for n in range(len(full) + 1)
        }
        assert int(got.record.arm[row]) == 1 + combined.MATCHES.index(9)
        assert int(got.decision.nodes[row]) == LOOKUP_NODES
      else:
        assert paths(got, context, row) == paths(levels, context, row)
        assert int(got.record.arm[row]) == combined.MODEL
        assert int(got.decision.nodes[row]) == 7
    assert int(got.levels) == (0 if all(is_copy) else DEPTH)
    assert bool(got.record.is_model) == (not all(is_copy))
  # A row that is over does not make the model run.
  over = dataclasses.replace(context, active=jnp.array([True, False]))
  got = draft(drafter, state, over, SHAPE)
  assert int(got.levels) == (0 if min_match == 1 else DEPTH)


def test_learns_from_steps_that_are_over(table):
  drafter = make(
    table, speculative.PromptLookup(max_match=16), decay=0.5, drift=0.0
  )
  context = lookup_test.context_of([REPEATS])
  state = drafter.init(None, batch=1, capacity=40)
  tokens = jnp.zeros((1, 7), jnp.int32)

  def after(state, made, count):
    committed = base.Committed(
      tokens=tokens, next_tokens=tokens, start=jnp.zeros(1, jnp.int32),
      counts=jnp.array([count], jnp.int32), record=made.record,
    )  # fmt: skip
    return drafter.extend(
      None, state, committed, is_prefill=False, attention_fn=None
    )

  drafted = []
  for count in (7, 7, 1, 1, 1, 1, 1):
    made = draft(drafter, state, context, SHAPE)
    drafted.append(int(made.levels))
    state = after(state, made, count)
  # Copies that are wrong lead to the model, which is no better in the end.
  assert drafted[:3] == [0, 0, 0] and DEPTH in drafted[3:]
  assert drafted[-1] == 0
  # A row that took no part, a prompt and plain steps count nothing.
  made = draft(drafter, state, context, SHAPE)
  same = after(state, made, 0)
  np.testing.assert_array_equal(same.tokens, state.tokens)
  same = after(state, dataclasses.replace(made, record=None), 7)
  np.testing.assert_array_equal(same.tokens, state.tokens)
  assert float(same.recent_time) == float(state.recent_time)


def test_a_row_without_a_match_is_nobodys(table):
  # So dear a model never runs.
  drafter = make(table, speculative.PromptLookup(), model_cost=1e6)
  context = lookup_test.context_of([FRESH])
  state = drafter.init(None, batch=1, capacity=40)
  made = draft(drafter, state, context, SHAPE)
  assert int(made.levels) == 0 and int(made.record.arm[0]) == -1
  assert paths(made, context, 0) == {()}
  # Nor does a match count that the lookup itself leaves out.
  long = speculative.PromptLookup(max_match=16, min_match=11)
  longer = dataclasses.replace(drafter, lookup=long)
  made = draft(longer, state, lookup_test.context_of([REPEATS]), SHAPE)
  assert int(made.levels) == 0 and int(made.record.arm[0]) == -1


@pytest.mark.parametrize("with_corpus", [False, True])
def test_longest_match_equals_search_in_python(with_corpus):
  rng = np.random.default_rng(2)
  rows = [rng.integers(0, 3, n).tolist() for n in (1, 4, 9, 20, 38)]
  corpus = rng.integers(0, 3, 40).tolist()
  drafter = speculative.SuffixMatch(
    corpus=jnp.asarray(corpus, jnp.int32) if with_corpus else None, max_match=5
  )
  got = drafter.longest_match(lookup_test.context_of(rows))

  def run(text, end, row):
    n = 0
    while n < min(5, end + 1, len(row)) and text[end - n] == row[-1 - n]:
      n += 1
    return n

  for row, found in zip(rows, got, strict=True):
    texts = [row, corpus] if with_corpus else [row]
    runs = [run(t, e, row) for t in texts for e in range(len(t) - 1)]
    assert int(found) == max(runs, default=0)


def test_a_policy_fitted_for_the_model_fits(table):
  drafter = make(table)
  assert base.fingerprint(drafter) == base.fingerprint(table)


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="older compilers copy the cache"
)
@pytest.mark.optimised
def test_no_step_copies_a_cache(target, prompts):
  drafter = make(
    speculative.SmallDecoder(model=target), speculative.PromptLookup(),
    drafter_depth=1,
  )  # fmt: skip
  session = speculative.prepare(
    target, drafter, prompts[:1], max_new_tokens=NEW, capacity=50,
    shape=tree.TreeShape(width=2, base_depth=1, max_depth=3, buckets=(1, 4)),
  )  # fmt: skip
  compiled = engine.decode.lower(
    session.target, session.drafter, session.policy, session.state,
    jnp.int32(1), settings=session.settings,
  ).compile()  # fmt: skip
  text = compiled.as_text()
  assert "f32[1,2,50,8]" in text
  copies = re.findall(r"= f32\[1,2,50,8\]\S* (?:copy|transpose)\(.*", text)
  assert not copies


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(min_match=0), "^min_match must be an"),
    (dict(lookup_nodes=0), "^lookup_nodes must be an"),
    (dict(drafter_depth=-1), "^drafter_depth must be an"),
    (dict(start=(1.0, 2.0)), "^start must hold the tokens of a step"),
    (dict(start=(0.5,) * 8), "^start must hold the tokens of a step"),
    (dict(model_cost=0.0), "^model_cost must be positive"),
    (dict(decay=1.0), "^decay must be in"),
    (dict(drift=1.5), "^drift must be in"),
    (dict(drafter_depth=7), "^drafter_depth must be at most max_depth"),
    (dict(drafter_depth=1), "^max_depth must be at least base_depth"),
  ],
)
def test_bad_settings(target, table, prompts, change, message):
  with pytest.raises(ValueError, match=message):
    generate(target, make(table, **change), prompts, "fixed")


def test_drafters_that_do_not_fit(target, other_model, table, prompts):
  drawn = speculative.SampledChain(
    model=other_model, sampler=models.Temperature()
  )
  with pytest.raises(ValueError, match=r"^drafter must draft level by level"):
    generate(target, make(drawn), prompts, "fixed")
  with pytest.raises(ValueError, match=r"^lookup must find matches"):
    generate(target, make(table, lookup=table), prompts, "fixed")
