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
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "batch num_kv_heads capacity head_dim"], ...]:
  """Writes n slots of each row of every buffer, from `starts` on.

  Args:
    buffers: keys and values of all layers, each [batch, num_kv_heads, capacity,
      head_dim]. Where the caller gives them away, they are written in place.
    new: what goes into each, [batch, n, num_kv_heads, head_dim].
    starts: int32 [batch], first slot, not negative; moved back where fewer than
      n follow.
    implementation: "triton" (head_dim a power of two from 16 to 256; one
      launch), "reference", a sequence to try in order, or None for what
      `dispatch.preferring` names, else "reference": the kernel was not yet
      measured.

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
  checks.require(
    1 <= new[0].shape[1] <= capacity,
    "new",
    "have a slot and no more than the buffers",
    new[0].shape[1],
    f"1 <= n <= {capacity}",
  )
  checks.check_shape("starts", starts, ("batch",), (batch,))
  if implementation is None:
    implementation = dispatch.preferred("cache_append") or "reference"
  return dispatch.dispatch(
    IMPLEMENTATIONS, implementation, tuple(buffers), tuple(new), starts
  )
