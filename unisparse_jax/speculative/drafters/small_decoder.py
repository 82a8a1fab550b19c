# SPDX-License-Identifier: Apache-2.0
"""An independent decoder that shares the target's vocabulary as drafter.

Source: Leviathan et al. (2023), Chen et al. (2023), for the idea; the tree is
that of EAGLE-2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import checks
from unisparse_jax import models
from unisparse_jax.models import kv_cache
from unisparse_jax.speculative import tree
from unisparse_jax.speculative.drafters import base, by_level


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallDecoderState:
  """Attributes:
  cache: of the drafter, root included.
  logits: float32 [batch, vocab_size], after the root.
  """

  cache: models.TreeCache
  logits: Float[Array, "batch vocab_size"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallDecoder(by_level.LevelDrafter):
  """A decoder as drafter.

  Attributes:
    model: with the target's vocabulary.
  """

  model: models.Decoder

  @property
  def needs_taps(self) -> bool:
    """False: it reads tokens alone."""
    return False

  def check(self, target: models.Decoder, shape: tree.TreeShape):
    """See `base.Drafter`."""
    for name in ("vocab_size", "max_len"):
      got = getattr(self.model.config, name)
      expected = getattr(target.config, name)
      ok = got == expected if name == "vocab_size" else got >= expected
      checks.require(
        ok, f"drafter {name}", "serve the target", got, f"{name}={expected}"
      )

  def init(self, target: Any, *, batch: int, capacity: int):
    """See `base.Drafter`."""
    config = self.model.config
    cache = kv_cache.KVCache.init(
      config, batch=batch, capacity=capacity, dtype=self.model.dtype
    )
    return SmallDecoderState(
      cache=models.TreeCache.from_cache(cache),
      logits=jnp.zeros((batch, config.vocab_size), jnp.float32),
    )

  def extend(self, target, state, committed, *, is_prefill, attention_fn):
    """See `base.Drafter`."""
    tokens, counts = committed.next_tokens, committed.counts
    if is_prefill:
      # The first token of all follows nothing.
      tokens = jnp.concatenate([committed.tokens[:, :1], tokens], axis=1)
      hidden, cache = self.model.hidden_states(
        tokens,
        cache=state.cache.to_cache(),
        attention_fn=attention_fn,
        lengths=counts + 1,
        cache_is_empty=True,
      )
      assert cache is not None, "a model that is given a cache returns one"
      cache = models.TreeCache.from_cache(cache)
      counts = counts + 1
    else:
      batch, n = tokens.shape
      index = jnp.arange(n, dtype=jnp.int32)
      is_before = index[:, None] >= index[None, :]
      out = models.tree_forward(
        self.model,
        tokens,
        committed.start[:, None] + 1 + index[None, :],
        jnp.broadcast_to(is_before[None], (batch, n, n)),
        state.cache,
      )
      hidden = out.hidden
      cache = state.cache.append(out.k, out.v, counts, num_slots=n)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = self.model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    logits = jnp.where((counts > 0)[:, None], logits, state.logits)
    return SmallDecoderState(cache=cache, logits=logits)

  def start(self, target, state, context, shape):
    """See `by_level.LevelDrafter`."""
    config, batch = self.model.config, context.lengths.shape[0]
    size = (batch, shape.num_slots, config.num_kv_heads, config.head_dim)
    empty = tuple(
      jnp.zeros(size, self.model.dtype) for _ in range(config.num_layers)
    )
    tokens, log_probs = base.top_children(state.logits, shape.width)
    return tokens, log_probs, models.Scratch(k=empty, v=empty)

  def grow(self, target, state, scratch, frontier, shape):
    """See `by_level.LevelDrafter`."""
    out = models.tree_forward(
      self.model,
      frontier.tokens,
      jnp.broadcast_to(frontier.positions[:, None], frontier.tokens.shape),
      frontier.visible,
      state.cache,
      scratch=scratch,
      slot=(frontier.level - 1) * shape.width,
    )
    tokens, log_probs = base.top_children(
      self.model.logits(out.hidden), shape.width
    )
    return tokens, log_probs, models.Scratch(k=out.k, v=out.v)
