# SPDX-License-Identifier: Apache-2.0
"""Shapes of what the programs of `long_context_programs` take."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.prefill import long_context_config as config_lib
from unisparse_jax import models

_CAPACITY_MULTIPLE = 128


def of(tree: Any) -> Any:
  """A tree of arrays as their shapes."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def capacity(length: int) -> int:
  """Tokens that the cache of a prompt and its answer has room for."""
  return -(-length // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE


class Shapes:
  """Of one model's arguments, by length.

  Args:
    config: the settings of the run.
    model_config: of the decoder.
  """

  def __init__(
    self,
    config: config_lib.LongContextConfig,
    model_config: models.DecoderConfig,
  ):
    self._config, self._model_config = config, model_config
    self._dtype = jnp.dtype(config.dtype)

  def tokens(self, length: int) -> jax.ShapeDtypeStruct:
    """One prompt of exactly this many tokens."""
    return jax.ShapeDtypeStruct((1, length), jnp.int32)

  def residual(self, length: int) -> jax.ShapeDtypeStruct:
    """What the last layer gives for a prompt of this length."""
    prompt_len = self._config.prompt_len(length)
    return jax.ShapeDtypeStruct(
      (1, prompt_len, self._model_config.embed_dim), self._dtype
    )

  def qkv(self, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Queries, keys and values of one layer."""
    model = self._model_config
    q, kv = (
      jax.ShapeDtypeStruct((1, length, heads, model.head_dim), self._dtype)
      for heads in (model.num_heads, model.num_kv_heads)
    )
    return q, kv, kv

  def prefilled(self, length: int) -> models.Prefilled:
    """One prompt's caches and logits."""
    model = self._model_config
    kv = jax.ShapeDtypeStruct(
      (
        model.num_layers,
        1,
        capacity(length),
        model.num_kv_heads,
        model.head_dim,
      ),
      self._dtype,
    )
    return models.Prefilled(
      logits=jax.ShapeDtypeStruct((1, model.vocab_size), jnp.float32),
      k=kv,
      v=kv,
      lengths=jax.ShapeDtypeStruct((1,), jnp.int32),
    )
