# SPDX-License-Identifier: Apache-2.0
import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unisparse_jax import models
from unisparse_jax.models import flattened


def decoder(config, seed=0):
  return models.Decoder(config, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(0, 32, (2, 5))


def test_everything_that_takes_a_decoder_takes_it_flat(small_model, tokens):
  model = small_model
  flat = models.flat(model)
  assert models.flat(flat) is flat and flat.module is model
  expected, cache = models.prefill(model, tokens, capacity=8)
  found, flat_cache = models.prefill(flat, tokens, capacity=8)
  np.testing.assert_array_equal(found, expected)
  token = jnp.argmax(expected, axis=-1)
  expected, _ = models.decode_step(model, token, cache)
  found, flat_cache = models.decode_step(flat, token, flat_cache)
  np.testing.assert_array_equal(found, expected)
  out, _ = models.decode(flat, found, flat_cache, max_new_tokens=2)
  whole = models.generate(model, tokens, max_new_tokens=4)
  np.testing.assert_array_equal(out, whole[:, 2:])
  np.testing.assert_array_equal(
    models.generate(flat, tokens, max_new_tokens=4), whole
  )


def test_other_weights_of_one_structure_compile_nothing(config):
  @jax.jit
  def first(flat):
    return flat.module.embed(jnp.zeros((1, 1), jnp.int32))

  one, other = decoder(config, 0), decoder(config, 1)
  found = [first(models.flat(m)) for m in (one, other, one)]
  assert first._cache_size() == 1
  np.testing.assert_array_equal(found[0], found[2])
  assert np.any(found[0] != found[1])
  deeper = dataclasses.replace(config, num_layers=3)
  first(models.flat(decoder(deeper)))
  assert first._cache_size() == 2


def test_structures_that_are_equal_are_one_object(config):
  one, other = (models.flat(decoder(config, seed)) for seed in (0, 1))
  structures = [jax.tree.structure(flat) for flat in (one, other)]
  assert structures[0] == structures[1]
  assert one.tree_flatten()[1] is other.tree_flatten()[1]
  assert jax.tree.structure(copy.deepcopy(one)) == structures[0]
  again = jax.tree.map(lambda x: x, one)
  assert isinstance(again, flattened.Flat) and again.module is not one.module
  np.testing.assert_array_equal(
    jax.tree.leaves(again.module)[0], jax.tree.leaves(one)[0]
  )
