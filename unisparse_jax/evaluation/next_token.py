# SPDX-License-Identifier: Apache-2.0
"""How far the next-token distribution moves from that of dense attention."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax import attention, models

_CHUNK = 512  # positions whose vocabulary scores are held at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenQuality:
  """Means over all positions of all rows.

  Attributes:
    kl: KL(dense || this), nats.
    agreement: share of positions with the same most likely token.
    loss: cross-entropy of the text, nats a token.
    dense_loss: that of dense attention.
  """

  kl: float
  agreement: float
  loss: float
  dense_loss: float


def hidden_states(
  model: models.Decoder,
  tokens: Int[Array, "batch len"],
  *,
  attention_fn: attention.AttentionFn,
) -> Float[Array, "batch len embed_dim"]:
  """What the vocabulary scores are made from, [batch, len, embed_dim]."""
  graphdef, state = nnx.split(model)
  return _hidden_states(graphdef, state, tokens, attention_fn)


def hidden_states_and_qkv(
  model: models.Decoder,
  tokens: Int[Array, "batch len"],
  *,
  attention_fn: attention.AttentionFn,
) -> tuple[Float[Array, "batch len embed_dim"], list[tuple]]:
  """`hidden_states` and `models.capture_qkv` in one pass."""
  graphdef, state = nnx.split(model)
  return _hidden_states_and_qkv(graphdef, state, tokens, attention_fn)


def next_token_quality(
  model: models.Decoder,
  tokens: Int[Array, "batch len"],
  *,
  attention_fn: attention.AttentionFn,
  dense_fn: attention.AttentionFn = attention.DenseAttention(),
) -> NextTokenQuality:
  """Compares two attentions on the same text.

  Args:
    model: a decoder.
    tokens: int [batch, len], text without padding.
    attention_fn: the attention in question.
    dense_fn: what it is compared with.

  Returns:
    The comparison. No [len, vocab_size] array is ever held.

  Raises:
    ValueError: fewer than 2 tokens.
  """
  hidden, dense_hidden = (
    hidden_states(model, tokens, attention_fn=fn)
    for fn in (attention_fn, dense_fn)
  )
  return compare_hidden_states(model, tokens, hidden, dense_hidden)


def compare_hidden_states(
  model: models.Decoder,
  tokens: Int[Array, "batch len"],
  hidden: Float[Array, "batch len embed_dim"],
  dense_hidden: Float[Array, "batch len embed_dim"],
) -> NextTokenQuality:
  """`next_token_quality` of two `hidden_states` that are known already."""
  checks.check_shape("tokens", tokens, ("batch", "len"), (None, None))
  checks.require(
    tokens.shape[1] > 1, "tokens", "hold 2 tokens or more", tokens.shape[1]
  )
  shape = (*tokens.shape, model.config.embed_dim)
  for name, value in (("hidden", hidden), ("dense_hidden", dense_hidden)):
    checks.check_shape(name, value, ("batch", "len", "embed_dim"), shape)
  graphdef, state = nnx.split(model)
  values = _compare(graphdef, state, tokens, hidden, dense_hidden)
  return NextTokenQuality(**{name: float(x) for name, x in values.items()})


def next_token_means(
  model: models.Decoder,
  tokens: Int[Array, "batch len"],
  hidden: Float[Array, "batch len embed_dim"],
  dense_hidden: Float[Array, "batch len embed_dim"],
) -> dict[str, Float[Array, ""]]:
  """`compare_hidden_states` inside a trace: float32 [] by name."""
  halves = [x[:, :-1] for x in (hidden, dense_hidden)]
  batch, num_positions, _ = halves[0].shape
  num_chunks = -(-num_positions // _CHUNK)
  pad = num_chunks * _CHUNK - num_positions

  def chunked(x):
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch, num_chunks, _CHUNK, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def add_up(total, operands):
    ours, dense, target, is_valid = operands
    log_p, log_q = (jax.nn.log_softmax(model.logits(h)) for h in (dense, ours))
    target = target[..., None]
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    agree = log_p.argmax(-1) == log_q.argmax(-1)
    loss, dense_loss = (
      -jnp.take_along_axis(x, target, axis=-1)[..., 0] for x in (log_q, log_p)
    )
    values = jnp.stack([kl, agree.astype(kl.dtype), loss, dense_loss])
    return total + (values * is_valid[None]).sum((1, 2)), None

  is_valid = jnp.ones((batch, num_positions), jnp.float32)
  total, _ = lax.scan(
    add_up,
    jnp.zeros((4,), jnp.float32),
    (*map(chunked, halves), chunked(tokens[:, 1:]), chunked(is_valid)),
  )
  means = total / jnp.float32(batch * num_positions)
  names = [field.name for field in dataclasses.fields(NextTokenQuality)]
  return dict(zip(names, means, strict=True))


@jax.jit(static_argnums=(0, 3))
def _hidden_states(graphdef, state, tokens, attention_fn):
  model = nnx.merge(graphdef, state)
  return model.hidden_states(tokens, attention_fn=attention_fn)[0]


@jax.jit(static_argnums=(0, 3))
def _hidden_states_and_qkv(graphdef, state, tokens, attention_fn):
  model = nnx.merge(graphdef, state)
  calls = []

  def record(q, k, v, **settings):
    calls.append((q, k, v))
    return attention_fn(q, k, v, **settings)

  return model.hidden_states(tokens, attention_fn=record)[0], calls


@jax.jit(static_argnums=0)
def _compare(graphdef, state, tokens, ours, dense):
  return next_token_means(nnx.merge(graphdef, state), tokens, ours, dense)
