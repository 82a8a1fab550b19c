# SPDX-License-Identifier: Apache-2.0
"""Public function of the op: contract, validation, dispatch."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.tree_attention import reference, triton, xla

IMPLEMENTATIONS = {
  "reference": reference.tree_attention,
  "xla": xla.tree_attention,
  "triton": triton.tree_attention,
}


def tree_attention(
  q: Float[Array, "batch q_len num_heads head_dim"],
  cache_k: Float[Array, "batch num_kv_heads capacity head_dim"],
  cache_v: Float[Array, "batch num_kv_heads capacity head_dim"],
  cache_len: Int[Array, " batch"],
  tree_k: Float[Array, "batch tree_len num_kv_heads head_dim"],
  tree_v: Float[Array, "batch tree_len num_kv_heads head_dim"],
  tree_mask: Bool[Array, "batch q_len tree_len"],
  counts: Int[Array, " batch"] | None = None,
  starts: Int[Array, " batch"] | None = None,
  *,
  scale: float | None = None,
  implementation: dispatch.Implementation = None,
) -> Float[Array, "batch q_len num_heads head_dim"]:
  """One softmax over the cache's valid slots and the visible new tokens.

  Serves a decoding step (one token), a draft tree and a chain alike. The cache
  is only read, so that it need not pass through the branches of a `lax.switch`.

  Args:
    q: [batch, q_len, num_heads, head_dim].
    cache_k: [batch, num_kv_heads, capacity, head_dim]: heads before slots,
      which lets a batched matrix product read it without a copy.
    cache_v: as cache_k; every slot must be finite.
    cache_len: int32 [batch], valid slots.
    tree_k: [batch, tree_len, num_kv_heads, head_dim].
    tree_v: as tree_k.
    tree_mask: bool [batch, q_len, tree_len], True where visible. A query needs
      a visible key, as its own.
    counts: int32 [batch], new tokens of each row that count, 0 to q_len; needs
      q_len == tree_len. They come first, and see none of the others. None: all.
    starts: int32 [batch], with counts: q, tree_k, tree_v and the result are
      then one flat row [1, packed, ...], where the tokens of row b that count
      lie from starts[b] on, row after row without a gap; their sum must not
      exceed packed. q_len and tree_len remain those of tree_mask.
    scale: softmax scale; default head_dim ** -0.5.
    implementation: "triton" (head_dim a power of two from 16 to 256; no
      gradient), "xla", "reference", a sequence to try in order, or None for
      what `dispatch.preferring` names, else the platform's default.

  Returns:
    [batch, q_len, num_heads, head_dim], dtype of q; zeros for tokens that do
    not count, which in a flat row are those behind the last row's.

  Raises:
    ValueError: shapes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.

  Cost: 4 batch num_heads q_len (cache + tree_len) head_dim operations, where
    "triton" counts the cache's valid slots and the others its capacity; for
    tiles of tokens that do not count it has none, where the others have all.
  """
  axes = ("batch", "q_len", "tree_len")
  checks.check_shape("tree_mask", tree_mask, axes, (None,) * 3)
  batch, q_len, tree_len = tree_mask.shape
  axes = ("batch", "q_len", "num_heads", "head_dim")
  rows = (batch, q_len) if starts is None else (1, None)
  checks.check_shape("q", q, axes, (*rows, None, None))
  num_heads, head_dim = q.shape[2:]
  axes = ("batch", "num_kv_heads", "capacity", "head_dim")
  checks.check_shape("cache_k", cache_k, axes, (batch, None, None, head_dim))
  num_kv_heads = cache_k.shape[1]
  checks.check_shape("cache_v", cache_v, axes, cache_k.shape)
  checks.check_shape("cache_len", cache_len, ("batch",), (batch,))
  axes = ("batch", "tree_len", "num_kv_heads", "head_dim")
  rows = (batch, tree_len) if starts is None else q.shape[:2]
  sizes = (*rows, num_kv_heads, head_dim)
  checks.check_shape("tree_k", tree_k, axes, sizes)
  checks.check_shape("tree_v", tree_v, axes, tree_k.shape)
  if starts is not None:
    checks.check_shape("starts", starts, ("batch",), (batch,))
    checks.require(
      counts is not None, "starts", "come with counts", counts, "int32 [batch]"
    )
  if counts is not None:
    checks.check_shape("counts", counts, ("batch",), (batch,))
    checks.require(
      q_len == tree_len,
      "counts",
      "come with a query for every new token",
      tuple(counts.shape),
      f"q_len == tree_len, not {q_len} and {tree_len}",
    )
  checks.check_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
  checks.check_scale(scale)
  if implementation is None:
    implementation = dispatch.preferred("tree_attention")
  return dispatch.dispatch(
    IMPLEMENTATIONS,
    implementation,
    q,
    cache_k,
    cache_v,
    cache_len,
    tree_k,
    tree_v,
    tree_mask,
    counts,
    starts,
    scale=head_dim**-0.5 if scale is None else scale,
  )
