# SPDX-License-Identifier: Apache-2.0
"""A prefill that is compiled for one layer and run over all of them.

The decoder unrolls its layers, and each call of a kernel is lowered and
compiled apart. A study of many attentions at many lengths spends its time
there. Here the layers are one `lax.scan`: their weights are stacked, and what
differs between their attentions is an array (`attention.LayerBudgets`).

The study model's prefill of 131,072 tokens with 8 layers of UniSparse, on one
CPU core: lowering for CUDA 0.5 s where the unrolled one takes 2.2 s, and 0.33
MB of program in place of 2.5 MB, hence one copy of each kernel to compile in
place of 8. At 8,192 tokens for the CPU: 0.4 s to trace and lower and 3.9 s to
compile, unrolled 1.8 and 8.5 s (JAX 0.11.2).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax import attention
from unisparse_jax.models import decoder, kv_cache, rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefilled:
  """What a prefill leaves.

  Attributes:
    logits: float32 [batch, vocab_size], after each row's last valid token.
    k: [num_layers, batch, capacity, num_kv_heads, head_dim], after RoPE.
    v: as k.
    lengths: int32 [batch].
    q: [num_layers, batch, q_len, num_heads, head_dim], or None.
    residual: [batch, q_len, embed_dim], what the last layer leaves, before the
      model's last norm, or None.
  """

  logits: Float[Array, "batch vocab_size"]
  k: Float[Array, "num_layers batch capacity num_kv_heads head_dim"]
  v: Float[Array, "num_layers batch capacity num_kv_heads head_dim"]
  lengths: Int[Array, " batch"]
  q: Float[Array, "num_layers batch q_len num_heads head_dim"] | None = None
  residual: Float[Array, "batch q_len embed_dim"] | None = None


def stack_layers(model: decoder.Decoder) -> nnx.State:
  """The weights of all layers, each with a leading axis of layers."""
  states = [nnx.state(block) for block in model.layers]
  return jax.tree.map(lambda *layers: jnp.stack(layers), *states)


@functools.partial(
  jax.jit,
  static_argnames=("attention_fn", "capacity", "keep_q", "keep_residual"),
)
def scanned_prefill(
  model: decoder.Decoder,
  layers: nnx.State,
  tokens: Int[Array, "batch q_len"],
  lengths: Int[Array, " batch"],
  budgets: attention.LayerBudgets,
  *,
  attention_fn: attention.BudgetedAttention,
  capacity: int,
  keep_q: bool = False,
  keep_residual: bool = False,
) -> Prefilled:
  """`models.prefill` with an empty cache, its layers scanned.

  Args:
    model: a decoder; of its layers only the structure is used.
    layers: from `stack_layers`.
    tokens: int32 [batch, q_len], right-padded.
    lengths: int32 [batch], valid tokens of each row.
    budgets: of each layer.
    attention_fn: from `attention.budgeted`, as `budgets`.
    capacity: slots of the cache, at least q_len.
    keep_q: also return the queries.
    keep_residual: also return what the last layer leaves at every position. It
      is there anyhow, so this costs memory and no time.

  Returns:
    Logits, keys and values. Compiled once for each shape and template.

  Raises:
    ValueError: the capacity is too small.
  """
  batch, q_len = tokens.shape
  checks.require(
    capacity >= q_len,
    "capacity",
    "be at least the length of tokens",
    capacity,
    f"capacity >= {q_len}",
  )
  decoder.check_len("tokens", q_len, model.config)
  graphdef = nnx.graphdef(model.layers[0])
  positions = jnp.arange(q_len, dtype=jnp.int32)[None, :]
  cos, sin = rope.cos_sin(positions, model.config)
  room = ((0, 0), (0, capacity - q_len), (0, 0), (0, 0))

  def one_layer(x, operands):
    state, layer = operands
    block = nnx.merge(graphdef, state)
    queries = []

    def attend(q, k, v):
      queries.append(q)
      return attention_fn(
        layer, q, k, v, causal=True, scale=None, q_offset=0, kv_len=lengths
      )

    x, k, v = block.attend_with(x, cos, sin, attend)
    kept = queries[0] if keep_q else None
    return x, (jnp.pad(k, room), jnp.pad(v, room), kept)

  x = model.embed(tokens)
  x, (k, v, q) = lax.scan(one_layer, x, (layers, budgets))
  last = decoder.last_valid(x, lengths)
  return Prefilled(
    logits=model.logits(model.norm(last)),
    k=k,
    v=v,
    lengths=jnp.broadcast_to(lengths, (batch,)),
    q=q,
    residual=x if keep_residual else None,
  )


def join_prefilled(
  rows: tuple[Prefilled, ...],
) -> tuple[Float[Array, "batch vocab_size"], kv_cache.KVCache]:
  """Logits and cache of prompts that were prefilled apart, for `decode`."""
  num_layers = rows[0].k.shape[0]

  def join(name):
    return tuple(
      jnp.concatenate([getattr(row, name)[layer] for row in rows])
      for layer in range(num_layers)
    )

  cache = kv_cache.KVCache(
    k=join("k"),
    v=join("v"),
    lengths=jnp.concatenate([row.lengths for row in rows]),
  )
  return jnp.concatenate([row.logits for row in rows]), cache
