# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax import models


def make_cache(config, batch=2, capacity=6, lengths=None):
  cache = models.KVCache.init(config, batch=batch, capacity=capacity)
  return cache if lengths is None else cache.advance(jnp.asarray(lengths))


def values(config, batch, q_len, first):
  """Distinct integers, [batch, q_len, num_kv_heads, head_dim]."""
  shape = (batch, q_len, config.num_kv_heads, config.head_dim)
  count = int(np.prod(shape))
  return jnp.arange(first, first + count, dtype=jnp.float32).reshape(shape)


@pytest.mark.parametrize("lengths", [(0, 0), (1, 3), (4, 0)])
@pytest.mark.parametrize("jit", [False, True])
def test_append_writes_past_each_rows_length(config, lengths, jit):
  cache = make_cache(config, lengths=lengths)
  k, v = values(config, 2, 2, 1), values(config, 2, 2, 1000)

  def append(cache, k, v):
    return cache.append(1, k, v)

  new = (jax.jit(append) if jit else append)(cache, k, v)
  expected_k, expected_v = np.zeros((2, *cache.k[1].shape))
  for row, length in enumerate(lengths):
    expected_k[row, length : length + 2] = k[row]
    expected_v[row, length : length + 2] = v[row]
  np.testing.assert_array_equal(new.k[1], expected_k)
  np.testing.assert_array_equal(new.v[1], expected_v)
  np.testing.assert_array_equal(new.k[0], np.zeros_like(expected_k))
  np.testing.assert_array_equal(new.lengths, lengths)


def test_append_to_one_row(config):
  cache = make_cache(config, batch=1, lengths=[3])
  k = values(config, 1, 2, 1)
  new = cache.append(0, k, k).advance(2)
  np.testing.assert_array_equal(new.k[0][:, 3:5], k)
  np.testing.assert_array_equal(new.lengths, [5])


def test_truncate_never_lengthens(config):
  cache = make_cache(config, lengths=[2, 5])
  np.testing.assert_array_equal(cache.truncate(3).lengths, [2, 3])
  back = cache.truncate(jnp.asarray([0, 9]))
  np.testing.assert_array_equal(back.lengths, [0, 5])
  np.testing.assert_array_equal(cache.lengths, [2, 5])


def test_dtype_of_the_buffers(config):
  cache = models.KVCache.init(config, batch=1, capacity=3, dtype=jnp.bfloat16)
  k = values(config, 1, 1, 1)
  assert cache.append(0, k, k).k[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["batch", "capacity"])
def test_bad_size_is_named(config, name):
  sizes = dict(batch=1, capacity=1) | {name: 0}
  with pytest.raises(ValueError, match=f"^{name} must "):
    models.KVCache.init(config, **sizes)


def test_append_checks_shapes_and_capacity(config):
  cache = make_cache(config)
  good = values(config, 2, 1, 0)
  with pytest.raises(ValueError, match=r"^v must have shape"):
    cache.append(0, good, good[:1])
  long = values(config, 2, 7, 0)
  with pytest.raises(ValueError, match="capacity=6; expected capacity >= 7"):
    cache.append(0, long, long)


def test_room_is_checked_where_lengths_are_known(config):
  cache = make_cache(config, lengths=[2, 5])
  assert cache.check_room(1) == 5
  with pytest.raises(ValueError, match=r"capacity >= 5 \+ 2"):
    cache.check_room(2)
  jax.jit(lambda cache: cache.check_room(2))(cache)  # unknown under jit
  with pytest.raises(ValueError, match="capacity"):
    jax.jit(lambda cache: cache.check_room(7))(cache)


def test_truncated_tokens_leave_no_trace(model):
  call = jax.jit(lambda tokens, cache: model(tokens, cache=cache))
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 40)
  empty = models.KVCache.init(model.config, batch=2, capacity=20)
  _, first = call(tokens[:, :6], empty)
  straight, _ = call(tokens[:, 6:], first)
  _, rejected = call(tokens[:, 3:9], first)
  assert np.abs(rejected.k[1] - first.k[1])[:, 6:12].max() > 0.1
  again, cache = call(tokens[:, 6:], rejected.truncate(6))
  np.testing.assert_array_equal(again, straight)
  np.testing.assert_array_equal(cache.lengths, [12, 12])


def test_overflow_under_jit_is_nan_not_silent(model):
  tokens = jnp.zeros((2, 2), jnp.int32)
  cache = models.KVCache.init(model.config, batch=2, capacity=4)
  cache = cache.advance(jnp.asarray([2, 3]))
  with pytest.raises(ValueError, match="capacity"):
    model(tokens, cache=cache)
  logits, _ = jax.jit(lambda cache: model(tokens, cache=cache))(cache)
  assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


def test_cache_of_another_model_is_refused(config, small_model):
  one_layer = dataclasses.replace(config, num_layers=1)
  tokens = jnp.zeros((1, 2), jnp.int32)
  for settings, batch in ((one_layer, 1), (config, 2)):
    cache = models.KVCache.init(settings, batch=batch, capacity=4)
    with pytest.raises(ValueError, match=r"^cache must have the model's"):
      small_model(tokens, cache=cache)
