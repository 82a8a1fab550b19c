# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from unisparse_jax import attention, models


def random_tokens(batch, q_len, seed=0):
  return jax.random.randint(jax.random.key(seed), (batch, q_len), 0, 40)


@dataclasses.dataclass(frozen=True, eq=False)
class CountingAttention:
  """Dense attention that keeps the q_len of every traced call."""

  q_lens: list = dataclasses.field(default_factory=list)

  def __call__(self, q, k, v, **kwargs):
    self.q_lens.append(q.shape[1])
    return attention.DenseAttention()(q, k, v, **kwargs)


@jax.jit
def _last_logits(model, tokens, lengths):
  return model(tokens, lengths=lengths, logits_for="last")[0]


def full_pass(model, tokens):
  """Logits after a list of tokens, without a cache; compiled once."""
  padded = np.zeros((1, 40), np.int32)
  padded[0, : len(tokens)] = tokens
  return _last_logits(model, padded, np.asarray([len(tokens)], np.int32))[0]


def filled_cache(model, lengths, capacity):
  """A cache of zeros that counts as filled; its values do not matter."""
  cache = models.KVCache.init(
    model.config, batch=len(lengths), capacity=capacity
  )
  return cache.advance(jnp.asarray(lengths, jnp.int32))


@pytest.fixture(scope="module")
def prompts(model):
  """Ragged prompts with what one pass gives: tokens, lengths, logits, cache."""
  tokens, lengths = random_tokens(3, 21), np.asarray([21, 5, 12], np.int32)
  logits, cache = models.prefill(model, tokens, lengths=lengths, capacity=32)
  return tokens, lengths, logits, cache


def test_prefill_equals_the_model(model, prompts):
  tokens, lengths, logits, cache = prompts
  for row, length in enumerate(lengths):
    expected = full_pass(model, tokens[row, :length])
    np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(cache.lengths, lengths)
  assert cache.capacity == 32 and cache.k[0].dtype == jnp.float32


# Measured 2.3e-6; the logits reach 5.
# Remainders of 1, 0 and 5, one pass; some rows end before the last chunk.
@pytest.mark.parametrize("chunk", [4, 7, 16, 100])
def test_chunked_prefill_equals_one_pass(model, prompts, chunk):
  tokens, lengths, logits, cache = prompts
  chunked_logits, chunked = models.prefill(
    model, tokens, lengths=lengths, capacity=32, chunk=chunk
  )
  np.testing.assert_allclose(chunked_logits, logits, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(chunked.lengths, lengths)
  for layer in range(model.config.num_layers):
    for row, length in enumerate(lengths):
      for x, y in ((chunked.k, cache.k), (chunked.v, cache.v)):
        np.testing.assert_allclose(
          x[layer][row, :length], y[layer][row, :length], rtol=1e-5, atol=1e-5
        )


def test_chunks_bound_the_pass(model):
  count = CountingAttention()
  tokens = random_tokens(1, 40)
  models.prefill(model, tokens, chunk=16, attention_fn=count)
  # Traced once for all whole chunks and once for the rest.
  layers = model.config.num_layers
  assert sorted(set(count.q_lens)) == [8, 16]
  assert len(count.q_lens) % layers == 0 and len(count.q_lens) <= 4 * layers


def test_a_prefix_serves_several_continuations(model):
  prefix, ends = random_tokens(1, 9), [random_tokens(1, 4, s) for s in (1, 2)]
  _, cache = models.prefill(model, prefix, capacity=16)
  for end in ends:
    logits, longer = models.prefill(model, end, cache=cache)
    expected = full_pass(model, np.concatenate([prefix[0], end[0]]))
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(longer.lengths, [13])
  np.testing.assert_array_equal(cache.lengths, [9])


def test_decode_steps_equal_full_passes(model, prompts):
  tokens, lengths, _, cache = prompts
  cache = jax.tree.map(jnp.copy, cache)  # `prompts` keeps its own
  more = random_tokens(3, 3, seed=1)
  for step in range(3):
    logits, cache = models.decode_step(model, more[:, step], cache)
  for row, length in enumerate(lengths):
    expected = full_pass(
      model, np.concatenate([tokens[row, :length], more[row]])
    )
    np.testing.assert_allclose(logits[row], expected, rtol=1e-5, atol=1e-5)


def test_decode_step_compiles_once_and_donates(model):
  count = CountingAttention()
  cache = filled_cache(model, [9, 3], 16)
  for step in range(4):
    old = cache
    _, cache = models.decode_step(
      model, jnp.full((2,), step), cache, attention_fn=count
    )
    assert old.k[0].is_deleted() and not cache.k[0].is_deleted()
  assert len(count.q_lens) == model.config.num_layers
  # Another batch is another program: the count can rise.
  cache = filled_cache(model, [9], 16)
  models.decode_step(model, jnp.zeros((1,), int), cache, attention_fn=count)
  assert len(count.q_lens) == 2 * model.config.num_layers


def naive_greedy(model, prompt, count):
  """A full pass per token."""
  tokens = list(prompt)
  for _ in range(count):
    tokens.append(int(jnp.argmax(full_pass(model, tokens))))
  return tokens[len(prompt) :]


@pytest.mark.parametrize("chunk", [None, 8])
def test_greedy_generation_equals_full_passes(model, prompts, chunk):
  tokens, lengths, *_ = prompts
  out = models.generate(
    model, tokens, max_new_tokens=6, lengths=lengths, chunk=chunk
  )
  assert out.shape == (3, 6) and out.dtype == jnp.int32
  for row, length in enumerate(lengths):
    expected = naive_greedy(model, np.asarray(tokens[row, :length]), 6)
    np.testing.assert_array_equal(out[row], expected)
  assert len(np.unique(np.asarray(out))) > 4  # not one token over and over


def test_ragged_batch_equals_a_single_prompt(model, prompts):
  tokens, lengths, *_ = prompts
  out = models.generate(model, tokens, max_new_tokens=6, lengths=lengths)
  single = models.generate(model, tokens[2:, : lengths[2]], max_new_tokens=6)
  np.testing.assert_array_equal(out[2:], single)


def test_rows_stop_at_their_own_eos(model, prompts):
  tokens, lengths, *_ = prompts
  settings = dict(max_new_tokens=6, lengths=lengths)
  free = np.asarray(models.generate(model, tokens, **settings))
  eos_id = int(free[0, 2])
  out = models.generate(model, tokens, eos_id=eos_id, **settings)
  ends = []
  for row in range(3):
    hits = np.flatnonzero(free[row] == eos_id)
    ends.append(hits[0] + 1 if hits.size else 6)
    np.testing.assert_array_equal(out[row, : ends[row]], free[row, : ends[row]])
    assert (np.asarray(out[row, ends[row] :]) == eos_id).all()
  assert ends[0] <= 3 and len(set(ends)) > 1


def test_loop_ends_with_the_last_row(model):
  cache = filled_cache(model, [9, 9], 64)
  logits = jax.random.normal(jax.random.key(0), (2, 40))
  first = np.asarray(jnp.argmax(logits, axis=-1)).tolist()
  out, cache = models.decode(
    model, logits, cache, max_new_tokens=50, eos_id=first
  )
  # Both rows end at once: no step has run, so nothing was appended.
  np.testing.assert_array_equal(cache.lengths, [9, 9])
  np.testing.assert_array_equal(out[:, 0], first)
  np.testing.assert_array_equal(out[:, 1:], np.full((2, 49), first[0]))


def test_a_stopped_row_adds_nothing_to_the_cache(model, prompts):
  _, lengths, logits, cache = prompts
  cache = jax.tree.map(jnp.copy, cache)
  eos_id = int(jnp.argmax(logits[1]))
  out, after = models.decode(
    model, logits, cache, max_new_tokens=6, eos_id=eos_id
  )
  is_end = np.asarray(out) == eos_id
  steps = np.where(is_end.any(axis=1), is_end.argmax(axis=1), 5)
  assert steps[1] == 0 and steps.max() > 0
  np.testing.assert_array_equal(after.lengths, lengths + steps)


def test_generation_compiles_once(model):
  dense, decode = CountingAttention(), CountingAttention()
  for seed in range(3):
    logits, cache = models.prefill(
      model, random_tokens(1, 20, seed), capacity=32, attention_fn=dense
    )
    models.decode(model, logits, cache, max_new_tokens=4, attention_fn=decode)
  layers = model.config.num_layers
  assert dense.q_lens == [20] * layers
  assert set(decode.q_lens) == {1} and len(decode.q_lens) <= 2 * layers


def test_attention_fn_of_generate_serves_the_prefill_alone(model):
  count = CountingAttention()
  models.generate(
    model, random_tokens(1, 20), max_new_tokens=3, attention_fn=count
  )
  assert set(count.q_lens) == {20}


def test_sparse_prefill_generates_like_dense_when_it_keeps_all(model):
  tokens = random_tokens(1, 48)
  pattern = attention.UniSparse(top_p=1.0, block_q=16, block_kv=16)
  expected = models.generate(model, tokens, max_new_tokens=4)
  actual = models.generate(
    model,
    tokens,
    max_new_tokens=4,
    chunk=32,
    attention_fn=attention.SparseAttention(pattern=pattern),
  )
  np.testing.assert_array_equal(actual, expected)


def test_sampled_generation_follows_the_key(model):
  tokens = random_tokens(2, 9)
  sampler = models.TopP(top_p=0.95, temperature=3.0)
  first, again, other = (
    np.asarray(
      models.generate(
        model,
        tokens,
        max_new_tokens=12,
        sampler=sampler,
        rng_key=jax.random.key(seed),
      )
    )
    for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).mean() > 0.2
  # The steps of one row draw from different keys.
  assert len(set(first[0].tolist())) > 3


def test_top_1_sampling_is_greedy(model):
  tokens = random_tokens(2, 9)
  expected = models.generate(model, tokens, max_new_tokens=6)
  actual = models.generate(
    model,
    tokens,
    max_new_tokens=6,
    sampler=models.TopK(top_k=1),
    rng_key=jax.random.key(0),
  )
  np.testing.assert_array_equal(actual, expected)


def test_bfloat16_generation(goldens):
  model = models.load_hf(goldens / "qwen3", dtype=jnp.bfloat16)
  tokens = random_tokens(2, 20)
  logits, cache = models.prefill(model, tokens, capacity=32)
  assert cache.k[0].dtype == jnp.bfloat16
  step, _ = models.decode_step(model, jnp.zeros((2,), jnp.int32), cache)
  joined = jnp.concatenate([tokens, jnp.zeros((2, 1), jnp.int32)], axis=1)
  expected, _ = models.prefill(model, joined)
  assert helpers.relative_error(step, expected) < 4e-2
  out = models.generate(model, tokens, max_new_tokens=3)
  np.testing.assert_array_equal(out[:, 0], jnp.argmax(logits, axis=-1))


BAD = [
  (dict(tokens=np.zeros((1, 129), int)), "^tokens must hold .*max_len=128"),
  (dict(tokens=np.zeros((1, 126), int)), "^tokens and max_new_tokens must"),
  (dict(tokens=np.zeros((4,), int)), "^tokens must have shape"),
  (dict(tokens=np.zeros((1, 0), int)), "^tokens must hold a token"),
  (dict(tokens=[[0.5]]), "^tokens must have an integer dtype"),
  (dict(max_new_tokens=0), "^max_new_tokens must"),
  (dict(lengths=[0]), "^lengths must be in"),
  (dict(lengths=[9]), "^lengths must be in"),
  (dict(lengths=[3, 3]), "^lengths must be an integer"),
  (dict(chunk=0), "^chunk must"),
  (dict(eos_id=40), "^eos_id must"),
  (dict(eos_id=0.5), "^eos_id must"),
  (dict(sampler=models.Temperature()), "^rng_key must be given"),
]


@pytest.mark.parametrize("settings, message", BAD)
def test_bad_argument_is_named_before_anything_runs(model, settings, message):
  count = CountingAttention()
  settings = dict(tokens=np.zeros((1, 8), int), max_new_tokens=4) | settings
  with pytest.raises(ValueError, match=message):
    models.generate(
      model, settings.pop("tokens"), attention_fn=count, **settings
    )
  assert not count.q_lens


def test_bad_prefill_argument_is_named(model):
  tokens = random_tokens(1, 8)
  cache = filled_cache(model, [8], 10)
  bad = [
    (dict(capacity=7), "^capacity must be at least"),
    (dict(capacity=12, cache=cache), "^capacity must be None"),
    (dict(cache=cache), r"^capacity must hold .* capacity >= 8 \+ 8"),
    (dict(attention_fn=[]), "^attention_fn must be hashable"),
  ]
  for settings, message in bad:
    with pytest.raises(ValueError, match=message):
      models.prefill(model, tokens, **settings)


def test_full_cache_is_refused_before_decoding(model):
  cache, logits = filled_cache(model, [8], 10), jnp.zeros((1, 40))
  with pytest.raises(ValueError, match=r"capacity >= 8 \+ 3"):
    models.decode(model, logits, cache, max_new_tokens=4)
  out, _ = models.decode(model, logits, cache, max_new_tokens=3)
  assert out.shape == (1, 3)


def test_cache_and_prompt_beyond_max_len_are_refused(model):
  cache = filled_cache(model, [100], 256)
  with pytest.raises(ValueError, match=r"^cache and tokens must .*max_len=128"):
    models.prefill(model, random_tokens(1, 40), cache=cache)
