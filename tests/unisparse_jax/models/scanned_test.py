# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unisparse_jax import attention, models
from unisparse_jax.models import scanned

CONFIG = models.DecoderConfig(
  vocab_size=64,
  num_layers=3,
  embed_dim=32,
  mlp_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  max_len=256,
)
LENGTHS = (200, 131)
BLOCKS = dict(block_q=32, block_kv=32)


@pytest.fixture(scope="module")
def model():
  return models.Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 64, (2, 200)).astype(np.int32)
  tokens[1, LENGTHS[1] :] = 0
  return jnp.asarray(tokens)


def sparse(name, **settings):
  return attention.SparseAttention(
    pattern=attention.make_pattern(name, **settings), implementation="xla"
  )


def layered(*layers):
  return attention.LayeredAttention(layers=layers)


FNS = {
  "dense": attention.DenseAttention(implementation="tiled"),
  "by layer and head": layered(
    *(
      sparse(
        "unisparse_threshold",
        min_score=limits,
        over_queries="max",
        head_group=None,
        **BLOCKS,
      )
      for limits in ((0.5, 2.0), (1.0, 0.2), (3.0, 3.0))
    )
  ),
  "mixed": layered(
    sparse("streaming", num_sink=32, num_local=32, **BLOCKS),
    sparse("xattention", top_p=0.7, **BLOCKS),
    sparse("xattention", top_p=1.0, **BLOCKS),
  ),
}


@pytest.mark.parametrize("name", ["by layer and head", "mixed"])
def test_equals_the_decoder(model, tokens, name):
  fn, budgets = attention.budgeted(
    FNS[name], num_layers=3, num_heads=4, num_kv_heads=2
  )
  lengths = jnp.asarray(LENGTHS, jnp.int32)
  found = models.scanned_prefill(
    model,
    models.stack_layers(model),
    tokens,
    lengths,
    budgets,
    attention_fn=fn,
    capacity=208,
    keep_q=True,
  )
  logits, cache = models.prefill(
    model, tokens, lengths=lengths, capacity=208, attention_fn=FNS[name]
  )
  np.testing.assert_allclose(found.logits, logits, atol=2e-6)
  for layer in range(3):
    for row, length in enumerate(LENGTHS):
      np.testing.assert_allclose(
        found.k[layer, row, :length], cache.k[layer][row, :length], atol=2e-6
      )
      np.testing.assert_allclose(
        found.v[layer, row, :length], cache.v[layer][row, :length], atol=2e-6
      )
  assert found.q is not None
  assert found.q.shape == (3, 2, 200, 4, 16)


def test_other_budgets_and_layers_compile_nothing_new(model, tokens):
  layers = models.stack_layers(model)
  scanned.scanned_prefill.clear_cache()
  logits = []
  for limits in ((0.1, 0.2), (5.0, 9.0)):
    fn, budgets = attention.budgeted(
      layered(
        *(
          sparse(
            "unisparse_threshold", min_score=limits, head_group=None, **BLOCKS
          )
          for _ in range(3)
        )
      ),
      num_layers=3,
      num_heads=4,
      num_kv_heads=2,
    )
    found = models.scanned_prefill(
      model,
      layers,
      tokens,
      jnp.asarray(LENGTHS, jnp.int32),
      budgets,
      attention_fn=fn,
      capacity=200,
    )
    logits.append(np.asarray(found.logits))
  assert scanned.scanned_prefill._cache_size() == 1
  # The budget is not ignored.
  assert np.abs(logits[0] - logits[1]).max() > 1e-4


def test_prompts_prefilled_apart_decode_together(model, tokens):
  fn, budgets = attention.budgeted(
    FNS["dense"], num_layers=3, num_heads=4, num_kv_heads=2
  )
  rows = tuple(
    models.scanned_prefill(
      model,
      models.stack_layers(model),
      tokens[row : row + 1],
      jnp.asarray(LENGTHS[row : row + 1], jnp.int32),
      budgets,
      attention_fn=fn,
      capacity=208,
    )
    for row in range(2)
  )
  logits, cache = jax.jit(models.join_prefilled)(rows)
  new, _ = models.decode(model, logits, cache, max_new_tokens=6)
  expected = models.generate(
    model,
    tokens,
    max_new_tokens=6,
    attention_fn=FNS["dense"],
    lengths=np.asarray(LENGTHS),
  )
  np.testing.assert_array_equal(new, expected)


def test_a_small_capacity_is_named(model, tokens):
  fn, budgets = attention.budgeted(
    FNS["dense"], num_layers=3, num_heads=4, num_kv_heads=2
  )
  with pytest.raises(ValueError, match=r"capacity must be at least"):
    models.scanned_prefill(
      model,
      models.stack_layers(model),
      tokens,
      jnp.asarray(LENGTHS, jnp.int32),
      budgets,
      attention_fn=fn,
      capacity=100,
    )
