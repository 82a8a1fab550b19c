# SPDX-License-Identifier: Apache-2.0
"""One token, a prompt and a tree through the same pass."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from unisparse_jax import attention, models

LENGTHS = np.asarray([7, 1, 4], np.int32)
PARENTS = [0, 0, 0, 1, 1, 2, 3, 6]  # node 0 is the root


def ancestors(parents):
  mask = np.eye(len(parents), dtype=bool)
  for node, parent in enumerate(parents):
    if node:
      mask[node] |= mask[parent]
  return mask


forward = functools.partial(jax.jit, static_argnames="taps")(
  models.tree_forward
)


@pytest.fixture(scope="module")
def setup(model):
  """Prompts in a cache, and a tree of tokens after each."""
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, 40, (3, 7)).astype(np.int32)
  _, cache = models.prefill(model, prompts, lengths=LENGTHS, capacity=16)
  tokens = rng.integers(0, 40, (3, len(PARENTS))).astype(np.int32)
  mask = np.tile(ancestors(PARENTS), (3, 1, 1))
  depths = mask[0].sum(-1) - 1
  positions = LENGTHS[:, None] + depths[None, :].astype(np.int32)
  tree_cache = models.TreeCache.from_cache(cache)
  return prompts, tokens, positions, mask, tree_cache


def path_to(node):
  path = [node]
  while path[-1]:
    path.append(PARENTS[path[-1]])
  return path[::-1]


def test_tree_equals_a_plain_pass_over_each_path(model, setup):
  prompts, tokens, positions, mask, cache = setup
  taps = models.tap_layers(model.config.num_layers)
  out = forward(model, tokens, positions, mask, cache, taps=taps)
  logits = model.logits(out.hidden)
  # One row per path: [3 * nodes, 7 + 5].
  rows, ends = [], []
  for row, length in enumerate(LENGTHS):
    for node in range(len(PARENTS)):
      known = [*prompts[row, :length], *tokens[row, path_to(node)]]
      rows.append(known + [0] * (12 - len(known)))
      ends.append(len(known) - 1)
  hidden, _, plain_taps = jax.jit(
    functools.partial(models.Decoder.hidden_states_and_taps, taps=taps)
  )(model, np.asarray(rows, np.int32))
  index = np.arange(len(rows))
  expected = model.logits(hidden[index, np.asarray(ends)])
  shape = (3, len(PARENTS), -1)
  # Measured 3e-6; the logits reach 5.
  np.testing.assert_allclose(logits, expected.reshape(shape), atol=1e-4)
  np.testing.assert_allclose(
    out.taps, plain_taps[index, np.asarray(ends)].reshape(shape), atol=1e-4
  )
  # The mask matters: every node seeing every other one is something else.
  wrong = forward(model, tokens, positions, np.ones_like(mask), cache)
  assert np.abs(model.logits(wrong.hidden) - logits).max() > 1e-2


def test_a_prefix_of_the_tree_has_the_same_logits(model, setup):
  _, tokens, positions, mask, cache = setup
  whole = forward(model, tokens, positions, mask, cache)
  part = forward(model, tokens[:, :3], positions[:, :3], mask[:, :3, :3], cache)
  np.testing.assert_allclose(part.hidden, whole.hidden[:, :3], atol=1e-5)


def test_packing_leaves_the_kept_nodes_as_they_are(model, setup):
  _, tokens, positions, mask, cache = setup
  counts = np.asarray([8, 0, 3], np.int32)
  kept = np.arange(len(PARENTS))[None, :] < counts[:, None]
  packing = models.Packing.of(jnp.asarray(counts), len(PARENTS), 14)
  whole = forward(model, tokens, positions, mask, cache, taps=(1,))
  packed = forward(
    model, tokens, positions, mask, cache, taps=(1,), packing=packing
  )
  columns = jnp.asarray([[7, 2], [0, 0], [2, 1]], jnp.int32)
  for ours, theirs in (
    (packed.hidden, whole.hidden),
    (packed.taps, whole.taps),
    (packed.k[-1], whole.k[-1]),
  ):
    assert ours.shape[:2] == (1, 14)
    rows = packing.unpack(ours)
    np.testing.assert_allclose(rows[kept], theirs[kept], atol=1e-5)
    assert (rows[~kept] == 0).all()
    taken = packing.take(ours, columns)
    for row in (0, 2):
      expected = rows[row][columns[row]]
      np.testing.assert_array_equal(taken[row], expected)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(packed))


def test_counts_leave_the_counted_nodes_as_they_are(model, setup):
  _, tokens, positions, mask, cache = setup
  counts = np.asarray([8, 0, 3], np.int32)
  kept = np.arange(len(PARENTS))[None, :] < counts[:, None]
  whole = forward(model, tokens, positions, mask, cache, taps=(1,))
  args = (model, tokens, positions, mask, cache)
  out = forward(*args, taps=(1,), counts=counts)
  for ours, theirs in (
    (out.hidden, whole.hidden),
    (out.taps, whole.taps),
    (out.k[-1], whole.k[-1]),
  ):
    np.testing.assert_allclose(ours[kept], theirs[kept], atol=1e-5)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))
  # Counts reach attention: one less is something else.
  fewer = forward(*args, taps=(1,), counts=counts - 1)
  assert np.abs(fewer.hidden[0, 7] - out.hidden[0, 7]).max() > 1e-3


def test_a_lower_triangle_is_a_prefill(model, setup):
  prompts, *_ = setup
  empty = models.KVCache.init(model.config, batch=3, capacity=8)
  mask = np.broadcast_to(np.tri(7, dtype=bool), (3, 7, 7))
  positions = np.broadcast_to(np.arange(7, dtype=np.int32), (3, 7))
  out = forward(
    model, prompts, positions, mask, models.TreeCache.from_cache(empty)
  )
  logits, cache = models.prefill(model, prompts, capacity=8)
  np.testing.assert_allclose(model.logits(out.hidden[:, -1]), logits, atol=1e-4)
  filled = models.TreeCache.from_cache(empty).append(
    out.k, out.v, jnp.full((3,), 7, jnp.int32), num_slots=7
  )
  for ours, theirs in zip(filled.to_cache().k, cache.k, strict=True):
    np.testing.assert_allclose(ours[:, :7], theirs[:, :7], atol=1e-5)
  np.testing.assert_array_equal(filled.lengths, cache.lengths)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_past_the_end_goes_into_the_last_slot(batch):
  old = jnp.arange(batch * 2 * 5 * 4, dtype=jnp.float32).reshape(batch, 2, 5, 4)
  cache = models.TreeCache(
    k=(old,), v=(old,), lengths=jnp.arange(5, 5 + batch, dtype=jnp.int32)
  )
  new = jnp.full((batch, 1, 2, 4), -1.0)
  filled = cache.append(
    (new,), (new,), jnp.ones((batch,), jnp.int32), num_slots=1
  )
  np.testing.assert_array_equal(filled.k[0][:, :, :4], old[:, :, :4])
  np.testing.assert_array_equal(filled.k[0][:, :, 4], -1.0)


def test_scratch_gives_level_by_level_what_one_pass_gives(model, setup):
  _, tokens, positions, mask, cache = setup
  whole = forward(model, tokens, positions, mask, cache)
  size = (3, 8, model.config.num_kv_heads, model.config.head_dim)
  empty = tuple(jnp.zeros(size) for _ in range(model.config.num_layers))
  scratch = models.Scratch(k=empty, v=empty)
  for start, end in ((0, 3), (3, 6), (6, 7), (7, 8)):  # levels, or parts of one
    out = forward(
      model,
      tokens[:, start:end],
      positions[:, start:end],
      mask[:, start:end],
      cache,
      scratch=scratch,
      slot=start,
    )
    scratch = models.Scratch(k=out.k, v=out.v)
    np.testing.assert_allclose(
      out.hidden, whole.hidden[:, start:end], atol=1e-4
    )


def test_tree_attention_equals_numpy():
  q, k, v = helpers.make_qkv(batch=2, q_len=5, kv_len=11, seed=1)
  mask = np.tile(ancestors([0, 0, 1, 1, 0]), (2, 1, 1))
  cache_len = np.asarray([6, 2], np.int32)
  # Keys 0..5 are the cache, 6..10 the tree.
  kept = np.zeros((2, 1, 5, 11), bool)
  for row, length in enumerate(cache_len):
    kept[row, 0, :, :length] = True
  kept[:, 0, :, 6:] = mask
  expected, _ = helpers.numpy_attention(q, k, v, np.tile(kept, (1, 4, 1, 1)))
  out = attention.tree_attention(
    q,
    jnp.swapaxes(k[:, :6], 1, 2),
    jnp.swapaxes(v[:, :6], 1, 2),
    cache_len,
    k[:, 6:],
    v[:, 6:],
    mask,
  )
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_noise_depends_on_request_and_position_alone():
  keys = models.row_keys(jax.random.key(0), 3)
  positions = jnp.asarray([[4, 5], [4, 9], [5, 4]])
  noise = models.noise_at(keys, positions, 7)
  alone = models.noise_at(keys[2:], positions[2:, ::-1], 7)
  np.testing.assert_array_equal(noise[2, ::-1], alone[0])
  assert not np.allclose(noise[0, 0], noise[1, 0])
  with pytest.raises(ValueError, match=r"^rng_key must be a key, or one for"):
    models.row_keys(jax.random.split(jax.random.key(0), 2), 3)


def test_rows_are_sampled_alike_in_any_batch(model):
  tokens = np.asarray([[3, 1, 4], [1, 5, 9]], np.int32)
  keys = jax.random.split(jax.random.key(0), 2)
  sample = functools.partial(
    models.generate, model, max_new_tokens=8, sampler=models.Temperature()
  )
  both = sample(tokens, rng_key=keys)
  swapped = sample(tokens[::-1], rng_key=keys[::-1])
  np.testing.assert_array_equal(both, swapped[::-1])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(positions=np.zeros((3, 2), np.int32)), "^positions must have shape"),
    (dict(mask=np.ones((3, 8, 7), bool)), "^mask must have shape"),
    (dict(tokens=np.zeros((2, 8), np.int32)), "^positions must have shape"),
  ],
)
def test_bad_arguments(model, setup, change, message):
  _, tokens, positions, mask, cache = setup
  kwargs = dict(tokens=tokens, positions=positions, mask=mask) | change
  with pytest.raises(ValueError, match=message):
    models.tree_forward(model, cache=cache, **kwargs)


def test_cache_of_another_batch(model, setup):
  _, tokens, positions, mask, cache = setup
  cache = dataclasses.replace(
    cache,
    k=tuple(x[:2] for x in cache.k),
    v=tuple(x[:2] for x in cache.v),
  )
  with pytest.raises(ValueError, match=r"^cache must have the model"):
    models.tree_forward(model, tokens, positions, mask, cache)


@pytest.mark.parametrize("count", [1, 3])
def test_repeating_the_last_token_changes_nothing(
  model, setup, monkeypatch, count
):
  """What a GPU does for few rows, done here."""
  _, tokens, positions, mask, cache = setup
  some = slice(0, count)
  args = (model, tokens[:, some], positions[:, some], mask[:, some, some])

  def run():
    return jax.jit(functools.partial(models.tree_forward, taps=(0, 1)))(
      *args, cache
    )

  # The package exports the function under the module's name.
  module = importlib.import_module("unisparse_jax.models.tree_forward")
  expected = run()
  monkeypatch.setitem(module._LEAST_ROWS, "cpu", 16)
  traced = []
  monkeypatch.setattr(
    module,
    "_padded",
    lambda *a, padded=module._padded: (traced.append(1), padded(*a))[1],
  )
  found = run()
  assert traced == [1]
  # Keys and values of the padding stay behind those asked for.
  k, v = (tuple(x[:, :count] for x in some) for some in (found.k, found.v))
  found = dataclasses.replace(found, k=k, v=v)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
  )
