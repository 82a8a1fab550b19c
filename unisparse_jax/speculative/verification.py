# SPDX-License-Identifier: Apache-2.0
"""Which draft nodes stand, given what the target says at every node.

`accept_matches` serves greedy and sampled decoding. At temperature > 0 every
node draws its token with noise that depends on the request and the position
only, so the walk meets exactly the tokens that plain decoding draws, whatever
was drafted. `accept_by_rejection` is the other classical rule, for draft tokens
that were drawn from a known distribution.

Source: SpecInfer (Miao et al., 2024), algorithm 2, for the recursive rejection;
Leviathan et al. (2023), appendix A.1, for the residual.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from unisparse_jax.speculative import tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance:
  """The accepted path and the tokens that it yields.

  Attributes:
    accept_len: int32 [batch], accepted draft nodes.
    path: int32 [batch, max_depth + 1], accepted node of every depth, the root
      first; past accept_len the deepest accepted one again.
    tokens: int32 [batch, max_depth + 1], the token after each path node; those
      up to index accept_len count, the last of them is the target's own.
  """

  accept_len: Int[Array, " batch"]
  path: Int[Array, "batch max_path"]
  tokens: Int[Array, "batch max_path"]


def is_any(
  tokens: Int[Array, "..."], eos_ids: tuple[int, ...]
) -> Bool[Array, "..."]:
  """Which tokens are one of `eos_ids`."""
  found = [tokens == eos_id for eos_id in eos_ids]
  return functools.reduce(operator.or_, found, jnp.zeros(tokens.shape, bool))


def until_end(
  tokens: Int[Array, "batch n"],
  counts: Int[Array, " batch"],
  eos_ids: tuple[int, ...],
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"]]:
  """How many of a row's first `counts` tokens stand; an end token is the last.

  Args:
    tokens: int32 [batch, n].
    counts: int32 [batch], 0 to n.
    eos_ids: tokens that end a row.

  Returns:
    int32 [batch], at most `counts`; and which rows have ended.
  """
  index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
  is_end = is_any(tokens, eos_ids) & (index < counts[:, None])
  first = jnp.min(jnp.where(is_end, index, tokens.shape[1]), axis=-1)
  return jnp.minimum(counts, first + 1), jnp.any(is_end, axis=-1)


def follow(
  tokens: Int[Array, "batch ..."],
  reference: Int[Array, "batch capacity"],
  positions: Int[Array, "batch ..."],
) -> Int[Array, "batch ..."]:
  """The tokens, but those of a given text where it has one.

  Drafts of one depth have one position: the text's token stands after each of
  them, beside its path too. A node is accepted only with all that is above it,
  and where all of that is the text's, so is what follows.

  Args:
    tokens: int32, what the target drew.
    reference: int32 by absolute position, -1 for none.
    positions: int32, of the tokens.

  Returns:
    int32, as tokens.
  """
  index = positions.reshape(positions.shape[0], -1)
  given = jnp.take_along_axis(reference, index, axis=1, mode="clip")
  given = given.reshape(positions.shape)
  return jnp.where(given < 0, tokens, given)


def accept_matches(
  draft: tree.DraftTree,
  targets: Int[Array, "batch num_nodes"],
  *,
  max_depth: int,
) -> Acceptance:
  """Accepts the nodes whose path agrees with the target's token everywhere.

  Siblings must be distinct, so at most one node of a depth is accepted.

  Args:
    draft: nodes.
    targets: int32 [batch, num_nodes], the target's token after each node.
    max_depth: static; deepest level.

  Returns:
    See `Acceptance`.
  """
  num_nodes = draft.tokens.shape[1]
  wanted = jnp.take_along_axis(targets, draft.parents, axis=1)
  index = jnp.arange(num_nodes, dtype=jnp.int32)
  is_match = (draft.valid & (draft.tokens == wanted)) | (index == 0)[None]
  # No node on the way from the root fails.
  accepted = ~jnp.any(draft.ancestors & ~is_match[:, None, :], axis=-1)
  depth = jnp.arange(max_depth + 1, dtype=jnp.int32)
  # [batch, max_depth + 1, num_nodes]
  here = accepted[:, None, :] & (
    draft.depths[:, None, :] <= depth[None, :, None]
  )
  # Parents stand before children: the deepest has the largest index.
  path = jnp.max(jnp.where(here, index[None, None, :], 0), axis=-1)
  accept_len = jnp.sum(accepted, axis=-1, dtype=jnp.int32) - 1
  return Acceptance(
    accept_len=accept_len,
    path=path,
    tokens=jnp.take_along_axis(targets, path, axis=1),
  )


def residual(
  p: Float[Array, "... vocab_size"], q: Float[Array, "... vocab_size"]
) -> Float[Array, "... vocab_size"]:
  """max(p - q, 0), normalised; p where the two agree, float32."""
  rest = jnp.maximum(p - q, 0.0)
  total = jnp.sum(rest, axis=-1, keepdims=True)
  return jnp.where(total > 1e-9, rest / jnp.maximum(total, 1e-9), p)


def accept_by_rejection(
  draft: tree.DraftTree,
  p: Float[Array, "batch num_nodes vocab_size"],
  q: Float[Array, "batch num_nodes vocab_size"] | None,
  keys: Array,
  *,
  max_depth: int,
) -> Acceptance:
  """Recursive rejection: exact for children drawn independently from q.

  At a node, its children are tried in order of index: child c stands with
  probability min(1, r(c) / q(c)), where r starts as p and becomes
  norm(max(r - q, 0)) after a rejection; with none left, a token of r is drawn.
  Equal siblings are allowed. Children must not have been dropped because of
  their score after they were drawn: the rule would be biased.

  Args:
    draft: nodes; the children of node i were drawn from q[i].
    p: float32 [batch, num_nodes, vocab_size], the target's distribution after
      each node, warped as plain sampling warps it.
    q: float32, as p: the drafter's distribution. None for children that were
      chosen and not drawn: each is then a point mass of its own.
    keys: [batch], one typed key a row and step.
    max_depth: static; deepest level.

  Returns:
    See `Acceptance`.
  """
  num_nodes = draft.tokens.shape[1]

  def row(draft_tokens, parents, valid, p, q, key):
    index = jnp.arange(num_nodes, dtype=jnp.int32)

    def level(carry, depth):
      node, alive, accept_len = carry
      level_key = jax.random.fold_in(key, depth)
      uniforms = jax.random.uniform(level_key, (num_nodes,))

      def try_child(carry, child):
        rest, chosen = carry
        is_child = (parents[child] == node) & valid[child] & (child > 0)
        is_tried = is_child & (chosen < 0)
        token = draft_tokens[child]
        proposal = jax.nn.one_hot(token, p.shape[-1], dtype=jnp.float32)
        proposal = proposal if q is None else q[node]
        # u < r / q without the division.
        stands = uniforms[child] * proposal[token] < rest[token]
        chosen = jnp.where(is_tried & stands, child, chosen)
        lost = is_tried & ~stands
        return (jnp.where(lost, residual(rest, proposal), rest), chosen), None

      (rest, chosen), _ = lax.scan(
        try_child, (p[node], jnp.int32(-1)), index[1:]
      )
      bonus_key = jax.random.fold_in(level_key, num_nodes)
      drawn = jax.random.categorical(bonus_key, jnp.log(rest))
      hit = alive & (chosen >= 0)
      token = jnp.where(hit, draft_tokens[chosen], drawn.astype(jnp.int32))
      out = (node, token)
      node = jnp.where(hit, chosen, node)
      return (node, hit, accept_len + hit.astype(jnp.int32)), out

    start = (jnp.int32(0), jnp.bool_(True), jnp.int32(0))
    (_, _, accept_len), (path, tokens) = lax.scan(
      level, start, jnp.arange(max_depth + 1, dtype=jnp.int32)
    )
    return accept_len, path, tokens

  in_axes = (0, 0, 0, 0, None if q is None else 0, 0)
  accept_len, path, tokens = jax.vmap(row, in_axes=in_axes)(
    draft.tokens, draft.parents, draft.valid, p, q, keys
  )
  return Acceptance(accept_len=accept_len, path=path, tokens=tokens)
