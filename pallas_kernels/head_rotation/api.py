# SPDX-License-Identifier: Apache-2.0
"""Public function of the op: contract, validation, dispatch."""

from jaxtyping import Array, Float

from pallas_kernels import checks, dispatch
from pallas_kernels.head_rotation import reference, triton

IMPLEMENTATIONS = {
  "reference": reference.head_rotation,
  "triton": triton.head_rotation,
}


def head_rotation(
  merged: Float[Array, "batch q_len channels"],
  cos: Float[Array, "#batch q_len 1 half"],
  sin: Float[Array, "#batch q_len 1 half"],
  q_scale: Float[Array, " head_dim"] | None = None,
  k_scale: Float[Array, " head_dim"] | None = None,
  *,
  num_heads: int,
  num_kv_heads: int,
  eps: float = 1e-6,
  implementation: dispatch.Implementation = None,
) -> tuple[
  Float[Array, "batch q_len num_heads head_dim"],
  Float[Array, "batch q_len num_kv_heads head_dim"],
  Float[Array, "batch q_len num_kv_heads head_dim"],
]:
  """Splits a projection into heads; q and k are normalised and rotated.

  RMSNorm over a head's channels (x / sqrt(mean(x ** 2) + eps) * scale, rounded
  to the dtype of x), then RoPE (channel i with channel i + head_dim / 2), both
  in float32.

  Args:
    merged: [batch, q_len, (num_heads + 2 * num_kv_heads) * head_dim], heads of
      q, then of k, then of v.
    cos: float32 [batch or 1, q_len, 1, head_dim / 2].
    sin: as cos.
    q_scale: [head_dim], of the norm of q; None: no norm.
    k_scale: likewise, of k; given if q_scale is.
    num_heads: of q.
    num_kv_heads: of k, and of v.
    eps: of the norms.
    implementation: "triton" (head_dim a power of two from 16 to 256),
      "reference", a sequence to try in order, or None for what
      `dispatch.preferring` names, else this platform's default.

  Returns:
    q [batch, q_len, num_heads, head_dim], k and v [batch, q_len, num_kv_heads,
    head_dim], dtype of merged.

  Raises:
    ValueError: shapes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.
  """
  checks.check_positive_int("num_heads", num_heads)
  checks.check_positive_int("num_kv_heads", num_kv_heads)
  axes = ("batch", "q_len", "channels")
  checks.check_shape("merged", merged, axes, (None,) * 3)
  batch, q_len, channels = merged.shape
  count = num_heads + 2 * num_kv_heads
  checks.check_divides(
    "num_heads + 2 * num_kv_heads", count, "channels of merged", channels
  )
  head_dim = channels // count
  checks.check_divides("two halves", 2, "head_dim", head_dim)
  checks.check_shape(
    "cos",
    cos,
    ("batch", "q_len", "one", "half"),
    (1 if cos.shape[:1] == (1,) else batch, q_len, 1, head_dim // 2),
  )
  checks.check_shape("sin", sin, ("batch", "q_len", "one", "half"), cos.shape)
  checks.require(
    (q_scale is None) == (k_scale is None),
    "k_scale",
    "be given if q_scale is",
    None if k_scale is None else k_scale.shape,
  )
  if q_scale is not None:
    checks.check_shape("q_scale", q_scale, ("head_dim",), (head_dim,))
    checks.check_shape("k_scale", k_scale, ("head_dim",), (head_dim,))
  if implementation is None:
    implementation = dispatch.preferred("head_rotation")
  return dispatch.dispatch(
    IMPLEMENTATIONS,
    implementation,
    merged,
    cos,
    sin,
    q_scale,
    k_scale,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    eps=eps,
  )
