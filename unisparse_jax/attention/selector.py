# SPDX-License-Identifier: Apache-2.0
"""What a sparse attention method is, and the table of those that exist."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from jaxtyping import Array, Float

from pallas_kernels import checks
from unisparse_jax.attention import block_mask
from unisparse_jax.attention.patterns import (
  dense,
  flexprefill,
  minference,
  oracle,
  random_blocks,
  sample_attention,
  streaming,
  unisparse,
  unisparse_threshold,
  xattention,
)


class Pattern(Protocol):
  """A method: frozen, hashable settings, static under jit."""

  @property
  def block_q(self) -> int: ...

  @property
  def block_kv(self) -> int: ...

  def select(
    self,
    q: Float[Array, "batch q_len num_heads head_dim"],
    k: Float[Array, "batch kv_len num_kv_heads head_dim"],
    *,
    causal: bool = True,
    scale: float | None = None,
    q_offset: Any = 0,
    kv_len: Any = None,
  ) -> block_mask.BlockMask:
    """Chooses what each block of queries attends; a pure function.

    Args:
      q: [batch, q_len, num_heads, head_dim], after position embedding.
      k: [batch, kv_len, num_kv_heads, head_dim].
      causal: whether a query sees only keys at or before its position.
      scale: softmax scale; default head_dim ** -0.5.
      q_offset: absolute position of query 0; scalar or [batch].
      kv_len: number of valid keys; scalar or [batch]; default all of k.

    Returns:
      The mask.
    """
    ...


PATTERNS: dict[str, Callable[..., Pattern]] = {
  "dense": dense.Dense,
  "flexprefill": flexprefill.FlexPrefill,
  "minference": minference.MInference,
  "oracle": oracle.Oracle,
  "random_blocks": random_blocks.RandomBlocks,
  "sample_attention": sample_attention.SampleAttention,
  "sample_attention_v1": sample_attention.SampleAttentionV1,
  "streaming": streaming.Streaming,
  "unisparse": unisparse.UniSparse,
  "unisparse_threshold": unisparse_threshold.UniSparseThreshold,
  "xattention": xattention.XAttention,
}


def make_pattern(name: str, **settings: Any) -> Pattern:
  """A pattern by its name in `PATTERNS`.

  Args:
    name: the method.
    **settings: fields of its dataclass.

  Returns:
    The pattern.

  Raises:
    ValueError: unknown name or setting, or a setting out of range.
  """
  checks.check_choice("pattern", name, PATTERNS)
  known = {f.name for f in dataclasses.fields(PATTERNS[name])}  # type: ignore
  for setting in settings:
    checks.check_choice(f"setting of {name}", setting, known)
  return PATTERNS[name](**settings)
