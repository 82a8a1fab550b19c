# SPDX-License-Identifier: Apache-2.0
"""Flax NNX decoder of the Llama and Qwen family."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax import attention
from unisparse_jax.models import (
  attention_layer,
  kv_cache,
  layers,
  rope,
)
from unisparse_jax.models import config as config_lib


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(
    self,
    config: config_lib.DecoderConfig,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
  ):
    types = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    norm = dict(eps=config.norm_eps, param_dtype=param_dtype)
    # Keeps the residual stream's variance from growing with depth.
    out_stddev = layers.INIT_STDDEV * (2 * config.num_layers) ** -0.5
    self.attention_norm = layers.RMSNorm(config.embed_dim, **norm)
    self.attention = attention_layer.Attention(
      config, out_stddev=out_stddev, **types
    )
    self.mlp_norm = layers.RMSNorm(config.embed_dim, **norm)
    self.mlp = layers.GatedMLP(
      config.embed_dim, config.mlp_dim, down_stddev=out_stddev, **types
    )

  def __call__(
    self, x: Float[Array, "batch q_len embed_dim"], cos, sin, **kwargs: Any
  ):
    """Args and returns as of `attention_layer.Attention`."""
    update, cache = self.attention(self.attention_norm(x), cos, sin, **kwargs)
    return self._add(x, update), cache

  def attend_with(
    self,
    x: Float[Array, "batch q_len embed_dim"],
    cos: Float[Array, "#batch q_len 1 half"],
    sin: Float[Array, "#batch q_len 1 half"],
    attend: Callable[[Array, Array, Array], Array],
  ) -> tuple[Array, Array, Array]:
    """The block with `attend(q, k, v)` in place of a cache.

    Returns:
      [batch, q_len, embed_dim], and k and v of x after RoPE.
    """
    q, k, v = self.attention.project(self.attention_norm(x), cos, sin)
    return self._add(x, self.attention.output(attend(q, k, v))), k, v

  def _add(self, x, update):
    x = x + update
    return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
  """Tokens to next-token logits, with or without a cache.

  Attributes:
    config: the architecture.
    dtype: of the activations; norms, RoPE and logits are float32 inside.
  """

  def __init__(
    self,
    config: config_lib.DecoderConfig,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    """Makes a decoder with random weights.

    Args:
      config: the architecture.
      rngs: source of the initial weights.
      dtype: float32 or bfloat16, of the activations.
      param_dtype: of the weights.
    """
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
      checks.check_dtype(name, value, ("float32", "bfloat16", "float16"))
    types = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    self.config = config
    self.dtype = jnp.dtype(dtype)
    self.embed = layers.Embed(config.vocab_size, config.embed_dim, **types)
    self.layers = nnx.List(
      [Block(config, **types) for _ in range(config.num_layers)]
    )
    self.norm = layers.RMSNorm(
      config.embed_dim, eps=config.norm_eps, param_dtype=param_dtype
    )
    if not config.tie_embeddings:
      self.lm_head = layers.Embed(config.vocab_size, config.embed_dim, **types)

  @property
  def num_params(self) -> int:
    """Number of weights; a tied embedding counts once."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(self, nnx.Param)))

  def __call__(
    self,
    tokens: Int[Array, "batch q_len"],
    *,
    cache: kv_cache.KVCache | None = None,
    attention_fn: attention.AttentionFn = attention.DenseAttention(),
    lengths: Int[Array, " batch"] | None = None,
    logits_for: Literal["all", "last"] = "all",
    remat: bool = False,
    cache_is_empty: bool = False,
  ) -> tuple[Float[Array, "..."], kv_cache.KVCache | None]:
    """Logits of the token after each given one.

    Args:
      tokens: int [batch, q_len], right-padded; they follow what `cache` holds.
        A token outside the vocabulary is clipped into it.
      cache: keys and values of earlier tokens. Each row's valid tokens are
        added to it.
      attention_fn: how every layer attends, or a `LayeredAttention`.
      lengths: int32 [batch], valid tokens of each row; default q_len.
      logits_for: "all" positions, or the "last" valid one of each row.
      remat: recompute each block in the backward pass. Not with a cache.
      cache_is_empty: promise that `cache` holds nothing, so that attention
        sees only the new keys and no offset.

    Returns:
      float32 [batch, q_len, vocab_size] or, for "last", [batch, vocab_size];
      and the new cache, or None. Logits at padding mean nothing. Where a row
      would exceed the cache's capacity they are NaN.

    Raises:
      ValueError: an argument is off; the message names it.
    """
    checks.check_choice("logits_for", logits_for, ("all", "last"))
    hidden, cache = self.hidden_states(
      tokens,
      cache=cache,
      attention_fn=attention_fn,
      lengths=lengths,
      remat=remat,
      cache_is_empty=cache_is_empty,
    )
    if logits_for == "last":
      hidden = last_valid(hidden, lengths)
    return self.logits(hidden), cache

  def hidden_states(
    self,
    tokens: Int[Array, "batch q_len"],
    *,
    cache: kv_cache.KVCache | None = None,
    attention_fn: attention.AttentionFn = attention.DenseAttention(),
    lengths: Int[Array, " batch"] | None = None,
    remat: bool = False,
    cache_is_empty: bool = False,
  ) -> tuple[Float[Array, "batch q_len embed_dim"], kv_cache.KVCache | None]:
    """What `logits` takes, [batch, q_len, embed_dim]; args as `__call__`."""
    hidden, cache, _ = self.hidden_states_and_taps(
      tokens,
      taps=(),
      cache=cache,
      attention_fn=attention_fn,
      lengths=lengths,
      remat=remat,
      cache_is_empty=cache_is_empty,
    )
    return hidden, cache

  def hidden_states_and_taps(
    self,
    tokens: Int[Array, "batch q_len"],
    *,
    taps: Sequence[int],
    cache: kv_cache.KVCache | None = None,
    attention_fn: attention.AttentionFn = attention.DenseAttention(),
    lengths: Int[Array, " batch"] | None = None,
    remat: bool = False,
    cache_is_empty: bool = False,
  ) -> tuple[Array, kv_cache.KVCache | None, Array | None]:
    """`hidden_states`, and the residual stream at the input of some layers.

    Args:
      tokens: see `__call__`; so are those that are not named here.
      taps: layers, in the order wanted; num_layers: the last one's output.
      cache: see `__call__`.
      attention_fn: see `__call__`.
      lengths: see `__call__`.
      remat: see `__call__`.
      cache_is_empty: see `__call__`.

    Returns:
      Hidden states, cache, and [batch, q_len, len(taps) * embed_dim], side by
      side; None for no taps.
    """
    self._check(tokens, cache, remat)
    batch, q_len = tokens.shape
    # [1 or batch, q_len]
    positions = jnp.arange(q_len, dtype=jnp.int32)[None, :]
    if cache is not None and not cache_is_empty:
      positions = cache.lengths[:, None] + positions
    cos, sin = rope.cos_sin(positions, self.config)
    if lengths is not None:
      lengths = checks.per_row("lengths", lengths, batch)

    x = self.embed(tokens)
    num_layers = len(self.layers)
    attention_fns = [
      attention.for_layer(attention_fn, layer, num_layers)
      for layer in range(num_layers)
    ]
    inputs = []
    if cache is None:

      def call(attend, block, x, cos, sin):
        return block(x, cos, sin, attention_fn=attend, lengths=lengths)[0]

      for block, attend in zip(self.layers, attention_fns, strict=True):
        inputs.append(x)
        layer_call = functools.partial(call, attend)
        # Not nnx.remat: it writes to the block, which fails where the caller's
        # trace closes over the model.
        layer_call = jax.checkpoint(layer_call) if remat else layer_call
        x = layer_call(block, x, cos, sin)
      inputs.append(x)
      return self.norm(x), None, join_taps(inputs, taps)

    new_cache = cache
    for layer, block in enumerate(self.layers):
      inputs.append(x)
      x, new_cache = block(
        x,
        cos,
        sin,
        cache=new_cache,
        layer=layer,
        cache_is_empty=cache_is_empty,
        attention_fn=attention_fns[layer],
        lengths=lengths,
      )
    assert new_cache is not None, "a layer that is given a cache returns one"
    inputs.append(x)
    x = self.norm(x)
    if not cache_is_empty:
      # A write past the end would land on valid slots: never silently.
      fits = cache.lengths + q_len <= cache.capacity
      x = jnp.where(fits[:, None, None], x, jnp.array(jnp.nan, x.dtype))
    new_cache = new_cache.advance(q_len if lengths is None else lengths)
    return x, new_cache, join_taps(inputs, taps)

  def logits(
    self, hidden: Float[Array, "... embed_dim"]
  ) -> Float[Array, "... vocab_size"]:
    """float32 vocabulary scores of hidden states."""
    head = self.embed if self.config.tie_embeddings else self.lm_head
    return head.attend(hidden)

  def _check(self, tokens, cache, remat):
    checks.check_shape("tokens", tokens, ("batch", "q_len"), (None, None))
    checks.require(
      jnp.issubdtype(tokens.dtype, jnp.integer),
      "tokens",
      "have an integer dtype",
      tokens.dtype.name,
    )
    checks.require(
      tokens.size > 0, "tokens", "hold a token", tuple(tokens.shape)
    )
    check_len("tokens", tokens.shape[1], self.config)
    if cache is None:
      return
    checks.require(not remat, "remat", "be False with a cache", remat)
    checks.require(
      (cache.num_layers, cache.batch) == (len(self.layers), tokens.shape[0]),
      "cache",
      "have the model's layers and the tokens' batch",
      (cache.num_layers, cache.batch),
      str((len(self.layers), tokens.shape[0])),
    )
    cache.check_room(tokens.shape[1])


def check_len(name: str, num_tokens: int, config: config_lib.DecoderConfig):
  """Raises `ValueError` naming the argument if a sequence is too long."""
  if num_tokens > config.max_len:
    raise ValueError(
      f"{name} must hold at most max_len tokens; got {num_tokens}, "
      f"max_len={config.max_len}."
    )


def tap_layers(num_layers: int) -> tuple[int, int, int]:
  """A low, a middle and a high layer whose inputs a draft head reads.

  Source: EAGLE-3 (Li et al., 2025) taps layers 2, L // 2 and L - 3. Differs
  from it in: 1, L // 2 and L - 1 for fewer than eight layers.
  """
  checks.check_positive_int("num_layers", num_layers)
  if num_layers >= 8:
    return 2, num_layers // 2, num_layers - 3
  return min(1, num_layers - 1), num_layers // 2, num_layers - 1


def join_taps(inputs: Sequence[Array], taps: Sequence[int]) -> Array | None:
  """The chosen layers' inputs side by side; None for none."""
  if not taps:
    return None
  return jnp.concatenate([inputs[layer] for layer in taps], axis=-1)


def last_valid(
  hidden: Float[Array, "batch q_len embed_dim"],
  lengths: Int[Array, " batch"] | None,
) -> Float[Array, "batch embed_dim"]:
  """Each row's hidden state at position lengths - 1; at 0 for a length of 0."""
  if lengths is None or hidden.shape[1] == 1:
    return hidden[:, -1]
  index = jnp.maximum(lengths - 1, 0)[:, None, None]
  return jnp.take_along_axis(hidden, index, axis=1)[:, 0]


@dataclasses.dataclass(eq=False)
class _Recorder:
  """An attention_fn that keeps what it is called with."""

  attention_fn: attention.AttentionFn
  calls: list = dataclasses.field(default_factory=list)

  def for_layer(self, layer, num_layers):
    attend = attention.for_layer(self.attention_fn, layer, num_layers)
    return _Recorder(attend, self.calls)

  def __call__(self, q, k, v, **kwargs):
    self.calls.append((q, k, v))
    return self.attention_fn(q, k, v, **kwargs)


def capture_qkv(
  model: Decoder,
  tokens: Int[Array, "batch q_len"],
  *,
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
  lengths: Int[Array, " batch"] | None = None,
) -> list[tuple[Array, Array, Array]]:
  """What every layer's attention sees in a prefill.

  Args:
    model: a decoder.
    tokens: int [batch, q_len].
    attention_fn: how the layers attend, which later layers depend on.
    lengths: int32 [batch], valid tokens of each row; default q_len.

  Returns:
    Per layer (q, k, v) after RoPE: [batch, q_len, num_heads, head_dim] and
    twice [batch, q_len, num_kv_heads, head_dim].
  """
  return _capture(model, tokens, lengths, attention_fn=attention_fn)


@functools.partial(jax.jit, static_argnames="attention_fn")
def _capture(model, tokens, lengths, *, attention_fn):
  recorder = _Recorder(attention_fn)
  model.hidden_states(tokens, attention_fn=recorder, lengths=lengths)
  return recorder.calls
