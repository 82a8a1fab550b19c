# SPDX-License-Identifier: Apache-2.0
"""Public functions of the op: contract, validation, dispatch, derivative."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from pallas_kernels import checks, dispatch
from pallas_kernels.logistic_likelihood import reference, triton, xla

IMPLEMENTATIONS = {
  "reference": reference.logistic_likelihood,
  "xla": xla.logistic_likelihood,
  "triton": triton.logistic_likelihood,
}


def logistic_likelihood(
  signed: Float[Array, "num_rows dim"],
  positions: Float[Array, "num_chains dim"],
  *,
  implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, " num_chains"], Float[Array, "num_chains dim"]]:
  """sum_i log sigmoid(<signed_i, x>) and its gradient for every chain's x.

  Args:
    signed: [num_rows, dim], the design; rows of label 0 negated.
    positions: [num_chains, dim], coefficients, of the same float dtype.
    implementation: "triton" (float32, dim <= 128), "xla", "reference", a
      sequence to try in order, or None for this platform's default.

  Returns:
    Values in nats and gradients.

  Raises:
    ValueError: shapes or dtypes disagree.
    NotImplementedError: the named implementation cannot serve these inputs.

  Cost: 4 num_chains num_rows dim operations. "triton" reads and writes
    positions, gradients and the design alone, the others every logit too.
  """
  checks.check_shape("signed", signed, ("num_rows", "dim"), (None, None))
  dim = signed.shape[1]
  checks.check_shape("positions", positions, ("num_chains", "dim"), (None, dim))
  checks.check_dtype("positions", positions.dtype, (signed.dtype.name,))
  return dispatch.dispatch(IMPLEMENTATIONS, implementation, signed, positions)


def log_likelihood(
  signed: Float[Array, "num_rows dim"],
  position: Float[Array, " dim"],
  *,
  implementation: dispatch.Implementation = None,
) -> Float[Array, ""]:
  """The value at one position, for `jax.vmap(jax.value_and_grad(...))`.

  Under `vmap` over positions all of them go to one call of
  `logistic_likelihood`, value and gradient together. Differentiable once, in
  reverse mode, in the position; the design counts as a constant.

  Args:
    signed: see `logistic_likelihood`.
    position: [dim].
    implementation: see there.

  Returns:
    The value, nats.
  """
  return differentiable(_named(implementation))(signed, position)


@functools.lru_cache(maxsize=16)
def _named(implementation):
  return functools.partial(logistic_likelihood, implementation=implementation)


@functools.lru_cache(maxsize=64)
def differentiable(batched_fn: Callable) -> Callable:
  """`log_likelihood` by a back end with its settings bound.

  Args:
    batched_fn: (signed, positions) -> values and gradients, as
      `logistic_likelihood`.

  Returns:
    (signed, position) -> value; the same function for the same batched_fn.
  """

  @jax.custom_batching.custom_vmap
  def both(signed, position):
    values, grads = batched_fn(signed, position[None])
    return values[0], grads[0]

  @both.def_vmap
  def _(axis_size, in_batched, signed, position):
    del axis_size
    if in_batched != [False, True]:
      raise NotImplementedError(
        "log_likelihood needs one design for all positions; got "
        f"batched={in_batched}. Use jax.lax.map over designs."
      )
    return batched_fn(signed, position), (True, True)

  @jax.custom_vjp
  def value(signed, position):
    return both(signed, position)[0]

  def forward(signed, position):
    return both(signed, position)

  def backward(grad, cotangent):
    return None, cotangent * grad

  value.defvjp(forward, backward)
  return value
