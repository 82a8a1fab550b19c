# SPDX-License-Identifier: Apache-2.0
"""Public function of the op: contract, validation, dispatch."""

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.top_log_probs import reference, triton, xla

IMPLEMENTATIONS = {
  "reference": reference.top_log_probs,
  "xla": xla.top_log_probs,
  "triton": triton.top_log_probs,
}


def top_log_probs(
  logits: Float[Array, "... vocab_size"],
  width: int,
  *,
  implementation: dispatch.Implementation = None,
) -> tuple[Int[Array, "... width"], Float[Array, "... width"]]:
  """The `width` likeliest tokens of each row, best first.

  Args:
    logits: [..., vocab_size]; no NaN.
    width: at most vocab_size.
    implementation: "triton" (vocab_size <= 32,768), "xla", "reference", a
      sequence to try in order, or None for what `dispatch.preferring` names,
      else the platform's default.

  Returns:
    int32 tokens [..., width], among equals the lower first, and float32
    log-probabilities under the softmax of all logits. These are at most 0:
    rounding must not let a child beat its parent.

  Raises:
    ValueError: shapes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.
  """
  checks.require(
    logits.ndim >= 1, "logits", "have an axis of tokens", logits.shape
  )
  checks.check_positive_int("width", width)
  checks.require(
    width <= logits.shape[-1],
    "width",
    "be at most the vocabulary",
    width,
    f"width <= {logits.shape[-1]}",
  )
  if implementation is None:
    implementation = dispatch.preferred("top_log_probs")
  return dispatch.dispatch(IMPLEMENTATIONS, implementation, logits, int(width))
