# SPDX-License-Identifier: Apache-2.0
"""Public function of the op: contract, validation, dispatch."""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.cache_append import reference, triton

IMPLEMENTATIONS = {
  "reference": reference.cache_append,
  "triton": triton.cache_append,
}


def cache_append(
  buffers: Sequence[Float[Array, "batch num_kv_heads capacity head_dim"]],
  new: Sequence[Float[Array, "batch n num_kv_heads head_dim"]],
  starts: Int[Array, " batch"],
  *,
  num_slots: int | None = None,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "batch num_kv_heads capacity head_dim"], ...]:
  """Writes slots of each row of every buffer, from `starts` on.

  Args:
    buffers: keys and values of all layers, each [batch, num_kv_heads, capacity,
      head_dim]. Where the caller gives them away, they are written in place.
    new: what goes into each, [batch, n, num_kv_heads, head_dim].
    starts: int32 [batch], first slot, not negative; moved back where fewer than
      `num_slots` follow.
    num_slots: how many to write, the first of n; default n.
    implementation: "triton" (head_dim a power of two from 16 to 256; one
      launch; no gradient), "reference", a sequence to try in order, or None for
      what `dispatch.preferring` names, else this platform's default.

  Returns:
    The buffers.

  Raises:
    ValueError: shapes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.
  """
  checks.require(
    len(buffers) > 0 and len(buffers) == len(new),
    "new",
    "be as many as buffers, at least one",
    len(new),
    str(max(1, len(buffers))),
  )
  axes = ("batch", "num_kv_heads", "capacity", "head_dim")
  checks.check_shape("buffers", buffers[0], axes, (None,) * 4)
  batch, num_kv_heads, capacity, head_dim = shape = buffers[0].shape
  axes_new = ("batch", "n", "num_kv_heads", "head_dim")
  sizes = (batch, None, num_kv_heads, head_dim)
  checks.check_shape("new", new[0], axes_new, sizes)
  for buffer, values in zip(buffers, new, strict=True):
    checks.check_shape("buffers", buffer, axes, shape)
    checks.check_shape("new", values, axes_new, new[0].shape)
  if num_slots is None:
    num_slots = new[0].shape[1]
  most = min(new[0].shape[1], capacity)
  checks.require(
    1 <= num_slots <= most,
    "num_slots",
    "be at least 1 and no more than new and the buffers have",
    num_slots,
    f"1 <= num_slots <= {most}",
  )
  checks.check_shape("starts", starts, ("batch",), (batch,))
  if implementation is None:
    implementation = dispatch.preferred("cache_append")
  return dispatch.dispatch(
    IMPLEMENTATIONS,
    implementation,
    tuple(buffers),
    tuple(new),
    starts,
    num_slots=num_slots,
  )
