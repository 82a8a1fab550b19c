# SPDX-License-Identifier: Apache-2.0
"""A chain drawn at random from a small decoder, with what it was drawn from.

Verified by rejection: a token x drawn from q stands with probability
min(1, p(x) / q(x)). Under sampling a chain stands longer than by matching, as
1 - TV(p, q) is at least sum p(x) q(x), and the output has the target's
distribution; but it is another draw than that of plain decoding.

Source: Leviathan et al. (2023), algorithm 1; Chen et al. (2023), algorithm 2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import checks
from unisparse_jax import models
from unisparse_jax.models import sampling
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree
from unisparse_jax.speculative.drafters import base, small_decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledChain:
  """Draws max_depth tokens, one after another.

  The tree must be a chain and the policy `Fixed`: what was drawn must not be
  dropped because of its value.

  Attributes:
    model: with the target's vocabulary.
    sampler: how it is drawn from; the target's own is a good choice.
  """

  model: models.Decoder
  sampler: sampling.Sampler = dataclasses.field(metadata=dict(static=True))

  needs_taps = False
  gives_probabilities = True

  @property
  def _decoder(self) -> small_decoder.SmallDecoder:
    return small_decoder.SmallDecoder(model=self.model)

  def check(self, target: models.Decoder, shape: tree.TreeShape):
    """See `base.Drafter`."""
    self._decoder.check(target, shape)
    checks.require(
      shape.width == 1 and shape.base_depth == shape.max_depth,
      "shape",
      "be a chain of one depth for drawn tokens",
      (shape.width, shape.base_depth, shape.max_depth),
      "width=1 and max_depth=base_depth",
    )

  def init(self, target: Any, *, batch: int, capacity: int):
    """See `base.Drafter`."""
    return self._decoder.init(target, batch=batch, capacity=capacity)

  def extend(self, target, state, committed, *, is_prefill, attention_fn):
    """See `base.Drafter`."""
    return self._decoder.extend(
      target, state, committed, is_prefill=is_prefill, attention_fn=attention_fn
    )

  def draft(self, target, state, context, *, shape, policy, policy_state):
    """See `base.Drafter`."""
    batch, depth = context.lengths.shape[0], shape.max_depth
    _, _, scratch = self._decoder.start(target, state, context, shape)
    step_keys = base.step_keys(context.keys, context.lengths, 0)
    logits, tokens, probabilities = state.logits, [], []
    slot = jnp.arange(depth, dtype=jnp.int32)[None, None, :]
    for level in range(depth):
      q = self.sampler.probabilities(logits)
      token = _draw(step_keys, level, q)
      tokens.append(token)
      probabilities.append(q)
      if level == depth - 1:
        break
      out = models.tree_forward(
        self.model,
        token[:, None],
        context.lengths[:, None] + level,
        jnp.broadcast_to(slot <= level, (batch, 1, depth)),
        state.cache,
        scratch=scratch,
        slot=level,
      )
      scratch = models.Scratch(k=out.k, v=out.v)
      logits = self.model.logits(out.hidden[:, 0])

    index = jnp.arange(depth, dtype=jnp.int32)
    zeros = jnp.zeros((batch,), jnp.float32)
    pool = tree.Pool(
      tokens=jnp.stack(tokens, axis=1),
      parents=jnp.broadcast_to(index[None] - 1, (batch, depth)),
      # Only the order counts.
      scores=jnp.broadcast_to(
        -(index[None] + 1).astype(jnp.float32), (batch, depth)
      ),
    )
    evidence = policy_lib.Evidence(
      entropy=zeros,
      score=zeros,
      frontier_tokens=tokens[-1][:, None],
      frontier_pool_index=jnp.full((batch, 1), depth - 1, jnp.int32),
      pool=pool,
      lengths=context.lengths,
    )
    return base.Draft(
      pool=pool,
      decision=policy.decide(policy_state, evidence),
      entropy=zeros,
      score=zeros,
      levels=jnp.int32(depth),
      probabilities=jnp.stack(probabilities, axis=1),
    )


def _draw(step_keys: Array, level: int, q: Array) -> Array:
  """int32 [batch], a token of each row of q."""

  def draw(key, q):
    key = jax.random.fold_in(key, level)
    return jax.random.categorical(key, jnp.log(q))

  return jax.vmap(draw)(step_keys, q).astype(jnp.int32)
