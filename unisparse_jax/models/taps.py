# SPDX-License-Identifier: Apache-2.0
"""Residual streams between a decoder's blocks, for a draft head."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax import attention
from unisparse_jax.models import decoder, rope


def hidden_and_taps(
  model: decoder.Decoder,
  tokens: Int[Array, "batch q_len"],
  tap_layers: Sequence[int],
  *,
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
  lengths: Int[Array, " batch"] | None = None,
) -> tuple[
  Float[Array, "batch q_len embed_dim"],
  Float[Array, "batch q_len taps_dim"],
]:
  """One pass without a cache that keeps some layers' inputs.

  Args:
    model: a decoder.
    tokens: int [batch, q_len], right-padded.
    tap_layers: layers whose input is kept, 0 to num_layers; num_layers is the
      last block's output.
    attention_fn: how every layer attends.
    lengths: int32 [batch], valid tokens of each row; default q_len.

  Returns:
    What `Decoder.logits` takes, and the taps side by side, [batch, q_len,
    len(tap_layers) * embed_dim].

  Raises:
    ValueError: a tap is no layer, or the sequence is too long.
  """
  num_layers = len(model.layers)
  check_taps("tap_layers", tap_layers, num_layers)
  decoder.check_len("tokens", tokens.shape[1], model.config)
  positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
  cos, sin = rope.cos_sin(positions, model.config)
  x = model.embed(tokens)
  streams: dict[int, jax.Array] = {}
  for layer, block in enumerate(model.layers):
    if layer in tap_layers:
      streams[layer] = x
    attend = attention.for_layer(attention_fn, layer, num_layers)
    x, _ = block(x, cos, sin, attention_fn=attend, lengths=lengths)
  streams[num_layers] = x
  taps = jnp.concatenate([streams[layer] for layer in tap_layers], axis=-1)
  return model.norm(x), taps


def check_taps(name: str, tap_layers: Sequence[int], num_layers: int):
  """Raises ValueError unless all are layers, or num_layers."""
  for layer in tap_layers:
    checks.require(
      isinstance(layer, int) and 0 <= layer <= num_layers,
      name,
      "be layers of the model",
      layer,
      f"0 to {num_layers}",
    )
