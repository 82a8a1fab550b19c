# SPDX-License-Identifier: Apache-2.0
"""Drafts with an EAGLE-3 style head, level by level.

Speculative keys and values live in a scratch buffer for one step only; accepted
tokens go through the head again, with the target's true features.

Source: Li et al., 2025, "EAGLE-3", arXiv 2503.01840, section 3.1; the life of
the cache as in the authors' code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax import attention
from unisparse_jax.speculative import eagle_head, tree
from unisparse_jax.speculative.drafters import base, by_level


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleState:
  """What the head keeps of the tokens that the target has taken.

  Attributes:
    k: [batch, num_kv_heads, capacity, head_dim], as `attention.tree_attention`
      reads it; slot i belongs to position i.
    v: as k.
    lengths: int32 [batch], valid slots.
    out: [batch, embed_dim], the head's output at the last valid slot.
  """

  k: Float[Array, "batch num_kv_heads capacity head_dim"]
  v: Float[Array, "batch num_kv_heads capacity head_dim"]
  lengths: Int[Array, " batch"]
  out: Float[Array, "batch embed_dim"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
  """What the head keeps of the nodes that a step has expanded.

  Attributes:
    k: [batch, num_slots, num_kv_heads, head_dim].
    v: as k.
    features: [batch, width, embed_dim], what the last level's nodes feed to
      their children; at level 1 that of the root, repeated.
  """

  k: Float[Array, "batch num_slots num_kv_heads head_dim"]
  v: Float[Array, "batch num_slots num_kv_heads head_dim"]
  features: Float[Array, "batch width embed_dim"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle(by_level.LevelDrafter):
  """A drafter that runs an `EagleHead`.

  Attributes:
    head: trained for the target.
  """

  head: eagle_head.EagleHead

  @property
  def needs_taps(self) -> bool:
    return True

  @property
  def tap_layers(self) -> tuple[int, ...]:
    """Layers of the target whose input the head reads."""
    return self.head.config.tap_layers

  def check(self, target: Any, shape: tree.TreeShape):
    config = self.head.config.target
    for name in ("vocab_size", "embed_dim", "num_layers"):
      checks.require(
        getattr(config, name) == getattr(target.config, name),
        "drafter",
        f"be made for a target of this {name}",
        getattr(config, name),
        f"{name}={getattr(target.config, name)}",
      )
    checks.require(
      shape.width <= config.vocab_size,
      "width",
      "be at most the draft vocabulary",
      shape.width,
      f"width <= {config.vocab_size}",
    )

  def init(self, target: Any, *, batch: int, capacity: int) -> EagleState:
    del target
    config, dtype = self.head.config.target, self.head.dtype
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    return EagleState(
      k=jnp.zeros(shape, dtype),
      v=jnp.zeros(shape, dtype),
      lengths=jnp.zeros((batch,), jnp.int32),
      out=jnp.zeros((batch, config.embed_dim), dtype),
    )

  def extend(
    self,
    target: Any,
    state: EagleState,
    committed: base.Committed,
    *,
    is_prefill: bool,
    attention_fn: Any,
  ) -> EagleState:
    del target
    assert committed.taps is not None, "needs_taps is true"
    head, counts = self.head, committed.counts
    features = head.fused(committed.taps)
    batch, n = committed.next_tokens.shape
    steps = jnp.arange(n, dtype=jnp.int32)
    positions = committed.start[:, None] + steps[None, :]
    q, k, v = head.project(committed.next_tokens, features, positions)
    if is_prefill:
      attended = attention_fn(
        q, k, v, causal=True, scale=None, q_offset=0, kv_len=counts
      )
    else:
      causal = steps[None, :, None] >= steps[None, None, :]
      attended = attention.tree_attention(
        q,
        state.k,
        state.v,
        state.lengths,
        k,
        v,
        jnp.broadcast_to(causal, (batch, n, n)),
      )
    out = head.finish(features, attended)
    # Writes come after every read of the buffers, or XLA copies them whole.
    out, k, v = jax.lax.optimization_barrier((out, k, v))
    slots = state.lengths[:, None] + steps[None, :]
    # Entries that are junk go past the end, where writes are dropped.
    slots = jnp.where(steps[None, :] < counts[:, None], slots, state.k.shape[2])
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def write(buffer, new):
      # Two index arrays around a slice: [batch, n, num_kv_heads, head_dim].
      new = new.astype(buffer.dtype)
      return buffer.at[rows, :, slots].set(new, mode="drop")

    last = jnp.maximum(counts - 1, 0)[:, None, None]
    last_out = jnp.take_along_axis(out, last, axis=1)[:, 0]
    return EagleState(
      k=write(state.k, k),
      v=write(state.v, v),
      lengths=state.lengths + counts,
      out=jnp.where((counts > 0)[:, None], last_out, state.out),
    )

  def start(
    self,
    target: Any,
    state: EagleState,
    context: base.Context,
    shape: tree.TreeShape,
  ) -> tuple[Array, Array, Scratch]:
    del target, context
    tokens, log_probs = base.top_children(
      self.head.logits(state.out), shape.width
    )
    batch, num_kv_heads, _, head_dim = state.k.shape
    slots = (batch, shape.num_slots, num_kv_heads, head_dim)
    features = self.head.feedback(state.out)[:, None]
    scratch = Scratch(
      k=jnp.zeros(slots, state.k.dtype),
      v=jnp.zeros(slots, state.v.dtype),
      features=jnp.broadcast_to(
        features, (batch, shape.width, features.shape[-1])
      ),
    )
    return tokens, log_probs, scratch

  def grow(
    self,
    target: Any,
    state: EagleState,
    scratch: Scratch,
    frontier: by_level.Frontier,
    shape: tree.TreeShape,
  ) -> tuple[Array, Array, Scratch]:
    del target
    head, width = self.head, shape.width
    features = jnp.take_along_axis(
      scratch.features, frontier.parent_slot[:, :, None], axis=1
    )
    # A slot has the position of its features: one before its token's.
    positions = jnp.broadcast_to(
      frontier.positions[:, None] - 1, frontier.tokens.shape
    )
    q, k, v = head.project(frontier.tokens, features, positions)
    first = (frontier.level - 1) * width

    def write(buffer, new):
      new = new.astype(buffer.dtype)
      return jax.lax.dynamic_update_slice(buffer, new, (0, first, 0, 0))

    new_k, new_v = write(scratch.k, k), write(scratch.v, v)
    attended = attention.tree_attention(
      q,
      state.k,
      state.v,
      state.lengths,
      new_k,
      new_v,
      frontier.visible,
    )
    out = head.finish(features, attended)
    tokens, log_probs = base.top_children(head.logits(out), width)
    scratch = Scratch(k=new_k, v=new_v, features=head.feedback(out))
    return tokens, log_probs, scratch
