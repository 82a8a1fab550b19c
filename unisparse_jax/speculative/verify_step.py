# SPDX-License-Identifier: Apache-2.0
"""One pass of the target over the drafted nodes, at one of a few sizes.

Only what the accepted paths need leaves the branches of the switch: at most
max_depth + 1 keys and values a row, so no branch pads its result to the largest
size and the cache is no result at all.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from unisparse_jax import models
from unisparse_jax.models import sampling
from unisparse_jax.speculative import tree, verification
from unisparse_jax.speculative.drafters import base


def sizes(shape: tree.TreeShape) -> Int[Array, " num_sizes"]:
  """int32, the size that each branch of the switch stands for."""
  return jnp.asarray(shape.packed or shape.buckets, jnp.int32)


def verify(
  target: models.Decoder,
  draft: tree.DraftTree,
  num_nodes: Int[Array, " batch"],
  active: Bool[Array, " batch"],
  cache: models.TreeCache,
  lengths: Int[Array, " batch"],
  limits: Int[Array, " batch"],
  keys: Any,
  reference: Int[Array, "batch capacity"] | None,
  *,
  shape: tree.TreeShape,
  sampler: sampling.Sampler,
  taps: Sequence[int],
  probabilities: Any = None,
) -> tuple[Array, Array, tuple[verification.Acceptance, tuple, tuple, Any]]:
  """Runs the smallest size that holds what every row asks for.

  Args:
    target: the model whose output is produced.
    draft: all nodes.
    num_nodes: int32 [batch], nodes asked for, root included.
    active: bool [batch], rows that still decode.
    cache: of the target; only read.
    lengths: int32 [batch], known tokens, root included.
    limits: int32 [batch], tokens at which a row is done.
    keys: [batch] typed keys, or None for a sampler without noise.
    reference: see `engine.DecodeState`; not with rejection.
    shape: static sizes.
    sampler: how the target's tokens are drawn.
    taps: layers whose input is returned for the accepted path.
    probabilities: of `drafters.base.Draft`; given, a chain is verified by
      rejection.

  Returns:
    The index of the size, the nodes that each row got, and: what was accepted;
    keys and values of the path, per layer [batch, max_depth + 1, num_kv_heads,
    head_dim]; and the taps of the path, or None.
  """
  if shape.packed:
    left = jnp.where(active, limits - lengths, 0)
    num_nodes = _share(draft, num_nodes, left, shape.packed[-1])
    total = jnp.sum(num_nodes)
  else:
    total = jnp.max(num_nodes)
  draft = draft.limit(num_nodes)

  def branch(size):
    return lambda *operands: _verify_size(
      target, size, *operands, shape=shape, sampler=sampler, taps=taps
    )

  branches = [branch(size) for size in shape.packed or shape.buckets]
  operands = (draft, cache, lengths, keys, reference, probabilities)
  if len(branches) == 1:
    return jnp.int32(0), num_nodes, branches[0](*operands)
  index = jnp.searchsorted(sizes(shape), total).astype(jnp.int32)
  index = jnp.minimum(index, len(branches) - 1)
  return index, num_nodes, lax.switch(index, branches, *operands)


def _share(draft, num_nodes, left, budget):
  """Nodes per row when the best `budget` nodes of all rows are kept.

  Scores fall along a row, so what is kept of it is a prefix. A batch is over
  with its last row: a node counts as much as its row has tokens `left`, and a
  finished row gets none.
  """
  batch, max_nodes = draft.scores.shape
  active = left > 0
  if batch * max_nodes <= budget:
    return jnp.where(active, num_nodes, 0)
  index = jnp.arange(max_nodes, dtype=jnp.int32)[None, :]
  usable = (index < num_nodes[:, None]) & active[:, None]
  share = jnp.maximum(left, 1) / jnp.maximum(jnp.max(left), 1)
  # A root goes before every draft node, a certain one (score 0) included.
  scores = draft.scores + jnp.log(share.astype(jnp.float32))[:, None]
  scores = jnp.where(index == 0, 1.0, scores)
  scores = jnp.where(usable, scores, 2 * tree.EMPTY).reshape(-1)
  top, chosen = lax.top_k(scores, budget)
  row = jnp.where(top > 1.5 * tree.EMPTY, chosen // max_nodes, batch)
  rows = jnp.arange(batch, dtype=jnp.int32)
  return jnp.sum(row[None, :] == rows[:, None], axis=-1, dtype=jnp.int32)


def _verify_size(
  target,
  size,
  draft,
  cache,
  lengths,
  keys,
  reference,
  probabilities,
  *,
  shape,
  sampler,
  taps,
):
  """Verifies with one static size: nodes a row, or in all if packed."""
  if not shape.packed:
    draft = draft.prefix(size)
  # Sorted by score: what is valid is a prefix, and so are its ancestors.
  counts = jnp.sum(draft.valid, axis=-1, dtype=jnp.int32)
  packing = None
  if shape.packed:
    packing = models.Packing.of(counts, draft.tokens.shape[1], size)
  # [batch, num_nodes]
  positions = lengths[:, None] - 1 + draft.depths
  out = models.tree_forward(
    target,
    draft.tokens,
    positions,
    draft.ancestors,
    cache,
    taps=taps,
    packing=packing,
    counts=None if shape.packed else counts,
  )
  logits = target.logits(out.hidden)
  if probabilities is None:
    noise = None
    if keys is not None:
      vocab_size = logits.shape[-1]
      noise = _node_noise(draft, lengths, keys, shape, vocab_size, packing)
    targets = sampling.draw_with_noise(sampler, logits, noise)
    if packing is not None:
      targets = packing.unpack(targets)
    if reference is not None:
      targets = verification.follow(targets, reference, positions + 1)
    acceptance = verification.accept_matches(
      draft, targets, max_depth=shape.max_depth
    )
  else:
    # The chain's last node has no child; what it was drawn from is not asked.
    q = jnp.pad(probabilities, ((0, 0), (0, 1), (0, 0)))
    acceptance = verification.accept_by_rejection(
      draft,
      sampler.probabilities(logits),
      q[:, : draft.tokens.shape[1]],
      base.step_keys(keys, lengths, 1),
      max_depth=shape.max_depth,
    )

  def on_path(values):
    if packing is not None:
      return packing.take(values, acceptance.path)
    index = acceptance.path.reshape(
      *acceptance.path.shape, *(1,) * (values.ndim - 2)
    )
    return jnp.take_along_axis(values, index, axis=1)

  tapped = None if out.taps is None else on_path(out.taps)
  k, v = tuple(map(on_path, out.k)), tuple(map(on_path, out.v))
  return acceptance, k, v, tapped


def _node_noise(draft, lengths, keys, shape, vocab_size, packing):
  """Noise of every node's next token: drawn per depth, not per node."""
  levels = min(shape.max_depth, draft.tokens.shape[1] - 1) + 1
  depth = jnp.arange(levels, dtype=jnp.int32)
  # A node of depth d sits at lengths - 1 + d; its next token one further.
  noise = sampling.noise_at(keys, lengths[:, None] + depth[None], vocab_size)
  if packing is None:
    return jnp.take_along_axis(noise, draft.depths[:, :, None], axis=1)
  rows = packing.flat // draft.tokens.shape[1]
  depths = draft.depths.reshape(-1)[packing.flat]
  return noise[rows, depths][None]
