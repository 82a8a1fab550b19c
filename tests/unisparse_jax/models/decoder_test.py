# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import helpers
from unisparse_jax import attention, models


def random_tokens(model, batch, q_len, seed=0):
  key = jax.random.key(seed)
  return jax.random.randint(key, (batch, q_len), 0, model.config.vocab_size)


SETTINGS = ("logits_for", "attention_fn", "cache_is_empty")


@functools.partial(jax.jit, static_argnames=SETTINGS)
def call(model, tokens, lengths=None, cache=None, **settings):
  return model(tokens, lengths=lengths, cache=cache, **settings)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
def test_num_params(config, tie_embeddings, qk_norm, attention_bias):
  config = dataclasses.replace(
    config,
    tie_embeddings=tie_embeddings,
    qk_norm=qk_norm,
    attention_bias=attention_bias,
  )
  model = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))
  # q, k, v, o; gate, up, down; two norms
  block = 16 * (32 + 16 + 16 + 32) + 3 * 16 * 24 + 2 * 16
  block += attention_bias * (32 + 16 + 16) + qk_norm * 2 * 8
  embeddings = 32 * 16 * (1 if tie_embeddings else 2)
  assert model.num_params == 2 * block + embeddings + 16


def test_weights_depend_on_the_seed_alone(config):
  first, again, other = (
    jax.tree.leaves(nnx.state(models.Decoder(config, rngs=nnx.Rngs(seed))))
    for seed in (1, 1, 2)
  )
  for x, y in zip(first, again, strict=True):
    np.testing.assert_array_equal(x, y)
  kernels = [(x, y) for x, y in zip(first, other, strict=True) if x.ndim == 2]
  assert all(np.mean(np.asarray(x == y)) < 0.01 for x, y in kernels)


def test_initial_loss_is_that_of_a_uniform_guess(small_model):
  tokens = random_tokens(small_model, 4, 32)
  logits, cache = call(small_model, tokens)
  assert logits.shape == (4, 32, 32) and logits.dtype == jnp.float32
  assert cache is None
  loss = -jax.nn.log_softmax(logits)[..., 0].mean()
  assert abs(float(loss) - np.log(32)) < 0.1


def test_a_later_token_changes_only_what_follows(model):
  tokens = random_tokens(model, 2, 20)
  changed = tokens.at[:, 10].set((tokens[:, 10] + 1) % 40)
  before, _ = call(model, tokens)
  after, _ = call(model, changed)
  np.testing.assert_array_equal(before[:, :10], after[:, :10])
  assert np.abs(before - after)[:, 10:].max(axis=-1).min() > 1e-3


def test_padding_changes_nothing(model):
  tokens = random_tokens(model, 2, 20)
  lengths = jnp.asarray([1, 7], jnp.int32)
  padded, _ = call(model, tokens, lengths)
  other = jnp.where(jnp.arange(20)[None, :] < lengths[:, None], tokens, 5)
  repadded, _ = call(model, other, lengths)
  for row, length in enumerate(lengths.tolist()):
    np.testing.assert_array_equal(padded[row, :length], repadded[row, :length])
  single, _ = call(model, tokens[1:2, :7])
  np.testing.assert_allclose(padded[1, :7], single[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [None, (20, 3)])
def test_last_logits_are_those_of_the_last_valid_token(model, lengths):
  tokens = random_tokens(model, 2, 20)
  lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
  every, _ = call(model, tokens, lengths)
  last, _ = call(model, tokens, lengths, logits_for="last")
  ends = [19, 19] if lengths is None else [19, 2]
  expected = every[jnp.arange(2), jnp.asarray(ends)]
  np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-5)


def test_last_logits_cost_one_row_of_the_head(config):
  config = dataclasses.replace(config, vocab_size=37)  # no other size is 37
  model = models.Decoder(config, rngs=nnx.Rngs(0))
  tokens = random_tokens(model, 2, 20)
  text = str(jax.make_jaxpr(lambda t: model(t, logits_for="last")[0])(tokens))
  assert "f32[2,37]" in text and "f32[2,20,37]" not in text
  full = str(jax.make_jaxpr(lambda t: model(t)[0])(tokens))
  assert "f32[2,20,37]" in full


@pytest.mark.parametrize("split", [1, 7])
def test_cached_pass_equals_full_pass(model, split):
  tokens = random_tokens(model, 2, 20)
  expected, _ = call(model, tokens)
  cache = models.KVCache.init(model.config, batch=2, capacity=24)
  first, cache = call(model, tokens[:, :split], cache=cache)
  second, cache = call(model, tokens[:, split:], cache=cache)
  actual = jnp.concatenate([first, second], axis=1)
  # Measured 3e-6; the logits reach 5.
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(cache.lengths, [20, 20])


def test_cached_pass_needs_the_right_positions(model):
  """What the comparison above would see if positions restarted at 0."""
  tokens = random_tokens(model, 2, 20)
  expected, _ = call(model, tokens)
  restarted, _ = call(model, tokens[:, 7:])
  assert np.abs(restarted - expected[:, 7:]).max() > 0.1


def test_ragged_rows_continue_at_their_own_length(model):
  tokens = random_tokens(model, 2, 20)
  lengths = jnp.asarray([4, 13], jnp.int32)
  cache = models.KVCache.init(model.config, batch=2, capacity=24)
  _, cache = call(model, tokens[:, :13], lengths, cache)
  more = jnp.stack([tokens[0, 4:7], tokens[1, 13:16]])
  actual, cache = call(model, more, cache=cache)
  np.testing.assert_array_equal(cache.lengths, [7, 16])
  expected, _ = call(model, tokens)
  np.testing.assert_allclose(actual[0], expected[0, 4:7], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    actual[1], expected[1, 13:16], rtol=1e-5, atol=1e-5
  )


def test_cache_is_empty_gives_the_same(model):
  tokens = random_tokens(model, 2, 20)
  empty = models.KVCache.init(model.config, batch=2, capacity=24)
  plain, plain_cache = call(model, tokens, cache=empty)
  promised, promised_cache = call(
    model, tokens, cache=empty, cache_is_empty=True
  )
  np.testing.assert_allclose(promised, plain, rtol=1e-5, atol=1e-5)
  for x, y in zip(plain_cache.k, promised_cache.k, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(promised_cache.lengths, [20, 20])


def loss_and_gradient(model, tokens, remat):
  graphdef, state = nnx.split(model)

  def loss(state):
    logits, _ = nnx.merge(graphdef, state)(tokens, remat=remat)
    return -jax.nn.log_softmax(logits[:, :-1])[..., 1].mean()

  return jax.jit(jax.value_and_grad(loss))(state)


def test_remat_changes_no_gradient(model):
  tokens = random_tokens(model, 2, 16)
  loss, gradient = loss_and_gradient(model, tokens, remat=False)
  remat_loss, remat_gradient = loss_and_gradient(model, tokens, remat=True)
  np.testing.assert_allclose(remat_loss, loss, rtol=1e-6)
  leaves = jax.tree.leaves(gradient)
  for x, y in zip(leaves, jax.tree.leaves(remat_gradient), strict=True):
    assert np.abs(x).max() > 0.0
    np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-5)
  text = str(jax.make_jaxpr(lambda t: model(t, remat=True)[0])(tokens))
  assert text.count("remat") >= model.config.num_layers


def test_gradient_equals_finite_differences(model):
  tokens = random_tokens(model, 2, 16)
  graphdef, state = nnx.split(model)
  direction = jax.tree.map(lambda x: jnp.sign(jnp.sin(1e3 * x)), state)

  @jax.jit
  def loss(step):
    moved = jax.tree.map(lambda x, d: x + step * d, state, direction)
    logits, _ = nnx.merge(graphdef, moved)(tokens)
    return -jax.nn.log_softmax(logits[:, :-1])[..., 1].mean()

  step = jnp.float32(2e-4)
  numeric = (loss(step) - loss(-step)) / (2 * step)
  assert float(jax.grad(loss)(jnp.float32(0.0))) == pytest.approx(
    float(numeric), rel=0.02
  )


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_is_near_float32(goldens, model, param_dtype):
  narrow = models.load_hf(
    goldens / "qwen3", dtype=jnp.bfloat16, param_dtype=param_dtype
  )
  params = jax.tree.leaves(nnx.state(narrow))
  assert {x.dtype for x in params} == {jnp.dtype(param_dtype)}
  tokens = random_tokens(model, 2, 20)
  expected, _ = call(model, tokens)
  actual, _ = call(narrow, tokens)
  assert actual.dtype == jnp.float32
  # Measured 1.0e-2, the rounding of activations to 8 bits.
  assert helpers.relative_error(actual, expected) < 4e-2


def test_bfloat16_cached_pass(goldens):
  model = models.load_hf(goldens / "qwen3", dtype=jnp.bfloat16)
  tokens = random_tokens(model, 2, 20)
  expected, _ = call(model, tokens)
  cache = models.KVCache.init(
    model.config, batch=2, capacity=24, dtype=jnp.bfloat16
  )
  _, cache = call(model, tokens[:, :10], cache=cache)
  actual, _ = call(model, tokens[:, 10:], cache=cache)
  assert helpers.relative_error(actual, expected[:, 10:]) < 4e-2


@dataclasses.dataclass(frozen=True)
class NoAttention:
  """Zero from everywhere, and a check of what it is called with."""

  def __call__(self, q, k, v, *, causal, scale, q_offset, kv_len):
    assert causal and scale is None
    assert k.shape == v.shape
    return jnp.zeros_like(q)


def test_attention_fn_is_what_attends(model):
  tokens = random_tokens(model, 2, 20)
  none, _ = call(model, tokens, attention_fn=NoAttention())
  # Without attention a token's logits depend on itself alone.
  alone, _ = call(model, tokens[:, 13:14], attention_fn=NoAttention())
  np.testing.assert_allclose(none[:, 13:14], alone, rtol=1e-4, atol=1e-5)
  dense, _ = call(model, tokens)
  assert np.abs(dense - none).max() > 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Spy:
  """Zero from everywhere, and what each call said about positions."""

  calls: list = dataclasses.field(default_factory=list)

  def __call__(self, q, k, v, *, causal, scale, q_offset, kv_len):
    def to_list(x):
      return x if x is None or isinstance(x, int) else x.tolist()

    self.calls.append((k.shape[1], to_list(q_offset), to_list(kv_len)))
    return jnp.zeros_like(q)


def test_what_attention_is_told(config, small_model):
  spy = Spy()
  tokens = jnp.zeros((2, 3), jnp.int32)
  lengths = jnp.asarray([3, 1], jnp.int32)
  empty = models.KVCache.init(config, batch=2, capacity=8)
  filled = empty.advance(jnp.asarray([4, 2], jnp.int32))
  for settings in (
    dict(),
    dict(lengths=lengths),
    dict(cache=empty, cache_is_empty=True),
    dict(cache=filled),
    dict(cache=filled, lengths=lengths),
  ):
    small_model(tokens, attention_fn=spy, **settings)
  assert spy.calls[:: config.num_layers] == [
    (3, 0, None),
    (3, 0, [3, 1]),
    (3, 0, None),
    (8, [4, 2], [7, 5]),
    (8, [4, 2], [7, 3]),
  ]


def test_sparse_attention_that_keeps_all_is_dense(model):
  tokens = random_tokens(model, 1, 64)
  pattern = attention.UniSparse(top_p=1.0, block_q=16, block_kv=16)
  sparse = attention.SparseAttention(pattern=pattern)
  actual, _ = call(model, tokens, attention_fn=sparse)
  expected, _ = call(model, tokens)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_capture_qkv_gives_what_attention_sees(model):
  tokens = random_tokens(model, 2, 20)
  captured = models.capture_qkv(model, tokens)
  assert len(captured) == model.config.num_layers
  empty = models.KVCache.init(model.config, batch=2, capacity=24)
  _, cache = call(model, tokens, cache=empty)
  for layer, (q, k, v) in enumerate(captured):
    assert q.shape == (2, 20, 4, 16)
    kept = cache.k[layer][:, :20]
    np.testing.assert_allclose(k, kept, rtol=1e-5, atol=1e-5)
    kept = cache.v[layer][:, :20]
    np.testing.assert_allclose(v, kept, rtol=1e-5, atol=1e-5)
  # The first layer by hand: norm, projection, head norm; no turn at 0.
  block = model.layers[0]
  x = block.attention_norm(model.embed(tokens))
  q = block.attention.q_proj(x)[:, 0].reshape(2, 4, 16)
  np.testing.assert_allclose(
    captured[0][0][:, 0], block.attention.q_norm(q), rtol=1e-4, atol=1e-5
  )


def test_capture_follows_the_attention_fn(model):
  tokens = random_tokens(model, 2, 20)
  dense = models.capture_qkv(model, tokens)
  none = models.capture_qkv(model, tokens, attention_fn=NoAttention())
  np.testing.assert_array_equal(dense[0][0], none[0][0])
  assert np.abs(dense[1][0] - none[1][0]).max() > 0.1


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(tokens=jnp.zeros((1, 65), jnp.int32)), r"^tokens must .*max_len=64"),
    (dict(tokens=jnp.zeros((3,), jnp.int32)), "^tokens must have shape"),
    (dict(tokens=jnp.zeros((1, 0), jnp.int32)), "^tokens must hold a token"),
    (dict(tokens=jnp.zeros((1, 3))), "^tokens must have an integer dtype"),
    (dict(logits_for="first"), "^logits_for must"),
    (dict(lengths=jnp.zeros((2,), jnp.int32)), "^lengths must"),
    (dict(lengths=jnp.zeros((1,))), "^lengths must"),
  ],
)
def test_bad_argument_is_named(small_model, settings, message):
  settings = dict(tokens=jnp.zeros((1, 3), jnp.int32)) | settings
  with pytest.raises(ValueError, match=message):
    small_model(settings.pop("tokens"), **settings)


def test_remat_with_a_cache_is_refused(config, small_model):
  cache = models.KVCache.init(config, batch=1, capacity=4)
  with pytest.raises(ValueError, match=r"^remat must be False"):
    small_model(jnp.zeros((1, 2), jnp.int32), cache=cache, remat=True)


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_bad_dtype_is_named(config, name):
  with pytest.raises(ValueError, match=f"^{name} must have dtype"):
    models.Decoder(config, rngs=nnx.Rngs(0), **{name: jnp.int32})
