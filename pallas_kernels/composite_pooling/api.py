# SPDX-License-Identifier: Apache-2.0
"""Public function of the op: contract, validation, dispatch."""

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.composite_pooling import mosaic_tpu, reference

IMPLEMENTATIONS = {
  "reference": reference.composite_pooling,
  "mosaic_tpu": mosaic_tpu.composite_pooling,
}


def composite_pooling(
  x: Float[Array, "batch len num_heads head_dim"],
  *,
  window: int,
  head_group: int = 1,
  length: int | Int[Array, "..."] | None = None,
  implementation: dispatch.Implementation = None,
) -> tuple[
  Float[Array, "batch num_composites num_groups head_dim"],
  Int[Array, "batch num_composites"],
]:
  """Composite tokens: means over `window` tokens and `head_group` heads.

  Args:
    x: [batch, len, num_heads, head_dim]; queries or keys.
    window: consecutive tokens in one composite.
    head_group: consecutive heads in one composite; divides num_heads.
    length: number of valid tokens; scalar or [batch]; default all. Tokens past
      it enter no mean.
    implementation: "mosaic_tpu", "reference" (any device), a sequence to try
      in order, or None for this platform's default.

  Returns:
    Means, float32 [batch, ceil(len / window), num_heads // head_group,
    head_dim], over the valid tokens alone; 0 where there is none.
    Valid tokens in each window, int32 [batch, ceil(len / window)].

  Raises:
    ValueError: shapes or settings disagree.

  Source: UniSparse (arXiv 2512.14082), sequence- and head-level compression.
  """
  checks.check_shape(
    "x", x, ("batch", "len", "num_heads", "head_dim"), (None,) * 4
  )
  checks.check_dtype("x", x.dtype, ("float32", "bfloat16", "float16"))
  checks.check_positive_int("window", window)
  checks.check_positive_int("head_group", head_group)
  checks.check_divides("head_group", head_group, "num_heads", x.shape[2])
  length = x.shape[1] if length is None else length
  return dispatch.dispatch(
    IMPLEMENTATIONS,
    implementation,
    x,
    checks.per_row("length", length, x.shape[0]),
    window=window,
    head_group=head_group,
  )
