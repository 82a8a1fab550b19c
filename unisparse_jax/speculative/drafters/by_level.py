# SPDX-License-Identifier: Apache-2.0
"""Drafting level by level, as EAGLE-2 does, with a depth that adapts.

Source: EAGLE-2 (Li et al., 2024), section 4.1 (expansion); HeteroSpec v1 (Liu
et al., 2025), sections 3.2 (entropy of the best path) and 3.4 (extension).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative import tree
from unisparse_jax.speculative.drafters import base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
  """The nodes of one level that are expanded next, best first.

  Attributes:
    tokens: int32 [batch, width].
    scores: float32 [batch, width]; `tree.EMPTY` for none.
    log_prob: float32 [batch, width], of the path from the root; `scores` but
      for a static tree.
    entropy: float32 [batch, width], summed from the root's distribution to
      that of the parent.
    last_log_prob: float32 [batch, width], of the node given its parent.
    pool_index: int32 [batch, width].
    parent_slot: int32 [batch, width], index in the frontier above; 0 at level
      1. What the drafter kept of the parent is gathered by it.
    visible: bool [batch, width, num_slots], scratch slots of the node and of
      its ancestors. A level's nodes own the slots from (level - 1) * width on.
    positions: int32 [batch], absolute position of these nodes' tokens:
      lengths - 1 + level.
    level: int32 scalar, from 1.
  """

  tokens: Int[Array, "batch width"]
  scores: Float[Array, "batch width"]
  log_prob: Float[Array, "batch width"]
  entropy: Float[Array, "batch width"]
  last_log_prob: Float[Array, "batch width"]
  pool_index: Int[Array, "batch width"]
  parent_slot: Int[Array, "batch width"]
  visible: Bool[Array, "batch width num_slots"]
  positions: Int[Array, " batch"]
  level: Int[Array, ""]


class LevelDrafter:
  """A drafter that grows its tree level by level, as EAGLE-2 does.

  A subclass gives `needs_taps`, `check`, `init`, `extend` and the two below.
  """

  def start(
    self, target: Any, state: Any, context: base.Context, shape: tree.TreeShape
  ) -> tuple[Array, Array, Any]:
    """Children of the root.

    Returns:
      tokens int32 [batch, width] and log-probabilities float32 [batch, width]
      under the draft softmax at temperature 1, best first (`top_children`); and
      a scratch pytree that `grow` carries, for example keys and values of
      shape [batch, num_slots, ...].
    """
    raise NotImplementedError

  def grow(
    self,
    target: Any,
    state: Any,
    scratch: Any,
    frontier: Frontier,
    shape: tree.TreeShape,
  ) -> tuple[Array, Array, Any]:
    """Children of every frontier node.

    Returns:
      tokens and log-probabilities [batch, width, width], best first in the last
      axis, and the scratch with this level written.
    """
    raise NotImplementedError

  def draft(
    self, target, state, context, *, shape, policy, policy_state
  ) -> base.Draft:
    """See `base.Drafter`."""
    return draft_by_level(
      self,
      target,
      state,
      context,
      shape=shape,
      policy=policy,
      policy_state=policy_state,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Carry:
  frontier: Frontier
  pool: tree.Pool
  scratch: Any


def draft_by_level(
  drafter: LevelDrafter,
  target: Any,
  state: Any,
  context: base.Context,
  *,
  shape: tree.TreeShape,
  policy: policy_lib.Policy,
  policy_state: Any,
) -> base.Draft:
  """Runs `start`, then `grow` base_depth - 1 times, then while a row asks.

  The last of them in blocks of `TreeShape.level_block`.

  Args:
    drafter: gives the children.
    target: the model that verifies.
    state: of the drafter.
    context: what is known.
    shape: sizes of the tree.
    policy: decides once base_depth levels are there.
    policy_state: of the policy.

  Returns:
    The draft; candidates below a row's own depth are emptied.
  """
  carry = _first_level(drafter, target, state, context, shape)

  def deepen(carry: _Carry, levels: int = 1) -> _Carry:
    return _next_levels(drafter, target, state, carry, shape, levels)

  if shape.unroll:
    carry = deepen(carry, shape.base_depth - 1)
  else:
    # A static number of rounds: no predicate goes through the host.
    carry = lax.fori_loop(
      0, shape.base_depth - 1, lambda _, carry: deepen(carry), carry
    )

  frontier = carry.frontier
  best = jnp.zeros_like(context.lengths)
  if policy.path_choice == "last":
    usable = frontier.scores > tree.EMPTY / 2
    best = jnp.argmax(
      jnp.where(usable, frontier.last_log_prob, -jnp.inf), axis=-1
    ).astype(jnp.int32)

  def of_best(values):
    return jnp.take_along_axis(values, best[:, None], axis=1)[:, 0]

  evidence = policy_lib.Evidence(
    entropy=of_best(frontier.entropy),
    score=of_best(frontier.log_prob),
    frontier_tokens=frontier.tokens,
    frontier_pool_index=frontier.pool_index,
    pool=carry.pool,
    lengths=context.lengths,
  )
  decision = policy.decide(policy_state, evidence)
  if shape.max_depth > shape.base_depth:
    deepest = jnp.max(jnp.where(context.active, decision.depth, 0))
    deepest = jnp.minimum(deepest, shape.max_depth)
    carry = _extend(carry, deepest, deepen, shape.base_depth, shape)
  # [1, pool_size] against [batch, 1]
  too_deep = jnp.asarray(_pool_levels(shape))[None, :] > decision.depth[:, None]
  pool = dataclasses.replace(
    carry.pool, scores=jnp.where(too_deep, tree.EMPTY, carry.pool.scores)
  )
  return base.Draft(
    pool=pool,
    decision=decision,
    entropy=evidence.entropy,
    score=evidence.score,
    levels=carry.frontier.level,
  )


def _extend(carry: _Carry, deepest, deepen, level: int, shape: tree.TreeShape):
  """More levels, while the frontier, at `level`, is above `deepest`."""

  def wants_more(carry: _Carry):
    return carry.frontier.level < deepest

  if not shape.unroll:
    return lax.while_loop(wants_more, deepen, carry)
  if level == shape.max_depth:
    return carry
  next_level = min(level + shape.level_block, shape.max_depth)

  def more(carry: _Carry):
    carry = deepen(carry, next_level - level)
    return _extend(carry, deepest, deepen, next_level, shape)

  return lax.cond(wants_more(carry), more, lambda carry: carry, carry)


def _pool_levels(shape: tree.TreeShape) -> np.ndarray:
  """int32 [pool_size], the level of every candidate, from 1."""
  counts = [shape.width] + [shape.width**2] * (shape.max_depth - 1)
  return np.repeat(np.arange(1, shape.max_depth + 1, dtype=np.int32), counts)


def _static_tables(shape: tree.TreeShape) -> tuple[np.ndarray, np.ndarray]:
  """Per level which children are nodes, and their scores; [levels, width]."""
  chosen = np.zeros((shape.max_depth, shape.width), np.int32)
  scores = np.full((shape.max_depth, shape.width), tree.EMPTY, np.float32)
  count = 0
  for level, nodes in enumerate(shape.static_levels):
    for j, (parent, rank) in enumerate(nodes):
      count += 1
      chosen[level, j] = rank if level == 0 else parent * shape.width + rank
      scores[level, j] = -float(count)  # level by level, as listed
  return chosen, scores


def _select(scores, shape: tree.TreeShape, level):
  """The next frontier: scores and indices of [batch, candidates]."""
  if not shape.static_levels:
    top, index = lax.top_k(scores, shape.width)
    return scores, top, index
  chosen, fixed = (jnp.asarray(x) for x in _static_tables(shape))
  batch = scores.shape[0]
  index = jnp.broadcast_to(chosen[level - 1][None], (batch, shape.width))
  top = jnp.broadcast_to(fixed[level - 1][None], (batch, shape.width))
  top = jnp.where(
    jnp.take_along_axis(scores, index, axis=1) > tree.EMPTY / 2, top, tree.EMPTY
  )
  # Candidates that are no nodes of the tree stay out of the pool. A slot
  # without a node points at candidate 0 with EMPTY, which max ignores.
  rows = jnp.arange(batch)[:, None]
  pool = jnp.full_like(scores, tree.EMPTY).at[rows, index].max(top)
  return pool, top, index


def _first_level(drafter, target, state, context, shape) -> _Carry:
  batch, width = context.lengths.shape[0], shape.width
  tokens, log_probs, scratch = drafter.start(target, state, context, shape)
  log_probs = jnp.maximum(log_probs, tree.EMPTY)
  entropy = base.top_entropy(log_probs)[:, None]
  pool_scores, scores, index = _select(log_probs, shape, 1)

  def pick(values):
    return jnp.take_along_axis(values, index, axis=1)

  rest = shape.pool_size - width
  last = pick(log_probs)
  frontier = Frontier(
    tokens=pick(tokens),
    scores=scores,
    log_prob=last,
    entropy=jnp.broadcast_to(entropy, (batch, width)),
    last_log_prob=last,
    pool_index=index.astype(jnp.int32),
    parent_slot=jnp.zeros((batch, width), jnp.int32),
    visible=jnp.broadcast_to(
      jnp.eye(width, shape.num_slots, dtype=bool)[None],
      (batch, width, shape.num_slots),
    ),
    positions=context.lengths,
    level=jnp.int32(1),
  )
  pool = tree.Pool(
    tokens=jnp.pad(tokens, ((0, 0), (0, rest))),
    parents=jnp.full((batch, shape.pool_size), -1, jnp.int32),
    scores=jnp.pad(
      pool_scores, ((0, 0), (0, rest)), constant_values=tree.EMPTY
    ),
  )
  return _Carry(frontier=frontier, pool=pool, scratch=scratch)


def _next_levels(
  drafter, target, state, carry: _Carry, shape, levels: int
) -> _Carry:
  """So many levels more, whose candidates enter the pool in one write."""
  if levels == 0:
    return carry
  # First candidate of these levels in the pool.
  offset = shape.width + (carry.frontier.level - 1) * shape.width**2
  frontier, scratch, found = carry.frontier, carry.scratch, []
  for _ in range(levels):
    frontier, scratch, candidates = _next_level(
      drafter, target, state, frontier, scratch, shape
    )
    found.append(candidates)

  def write(buffer, *blocks):
    block = jnp.concatenate(blocks, axis=1)
    return lax.dynamic_update_slice(buffer, block, (0, offset))

  pool = jax.tree.map(write, carry.pool, *found)
  return _Carry(frontier=frontier, pool=pool, scratch=scratch)


def _next_level(drafter, target, state, frontier: Frontier, scratch, shape):
  """The next frontier, the drafter's scratch and the level's candidates."""
  width, batch = shape.width, frontier.tokens.shape[0]
  tokens, log_probs, scratch = drafter.grow(
    target, state, scratch, frontier, shape
  )
  log_probs = jnp.maximum(log_probs, tree.EMPTY)
  entropy = frontier.entropy + base.top_entropy(log_probs)
  is_empty = frontier.scores <= tree.EMPTY / 2

  def children(of_parent):
    """[batch, width * width] log-probabilities of the paths."""
    path = jnp.maximum(of_parent[:, :, None] + log_probs, tree.EMPTY)
    path = jnp.where(is_empty[:, :, None], tree.EMPTY, path)
    return path.reshape(batch, width * width)

  path_log_probs = children(frontier.log_prob)
  tokens = tokens.reshape(batch, width * width)
  level = frontier.level + 1
  pool_scores, scores, index = _select(path_log_probs, shape, level)
  parent_slot = index // width
  # First candidate of this level in the pool.
  offset = width + (level - 2) * width * width

  def pick(values):
    return jnp.take_along_axis(values, index, axis=1)

  def from_parent(values):
    return jnp.take_along_axis(values, parent_slot, axis=1)

  slot = (level - 1) * width + jnp.arange(width, dtype=jnp.int32)
  own = slot[:, None] == jnp.arange(shape.num_slots, dtype=jnp.int32)[None, :]
  visible = jnp.take_along_axis(
    frontier.visible, parent_slot[:, :, None], axis=1
  )
  new_frontier = Frontier(
    tokens=pick(tokens),
    scores=scores,
    log_prob=pick(path_log_probs),
    entropy=from_parent(entropy),
    last_log_prob=pick(log_probs.reshape(batch, width * width)),
    pool_index=offset + index,
    parent_slot=parent_slot,
    visible=visible | own[None],
    positions=frontier.positions + 1,
    level=level,
  )
  parents = jnp.repeat(
    frontier.pool_index, width, axis=1, total_repeat_length=width * width
  )

  candidates = tree.Pool(tokens=tokens, parents=parents, scores=pool_scores)
  return new_frontier, scratch, candidates
