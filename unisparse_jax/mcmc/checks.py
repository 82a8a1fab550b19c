# SPDX-License-Identifier: Apache-2.0
"""The one wording of argument errors of the samplers."""

import math
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def require(ok: bool, name: str, rule: str, got: Any, expected: str = ""):
  """Raises "<name> must <rule>; got <name>=<got>; ..." unless ok."""
  if not ok:
    tail = f"; expected {expected}" if expected else ""
    raise ValueError(f"{name} must {rule}; got {name}={got!r}{tail}.")


def check_positive_int(name: str, value: Any):
  """Checks that a static setting is an integer of at least 1."""
  ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  require(ok and int(value) >= 1, name, "be an integer >= 1", value)


def check_choice(name: str, value: Any, choices: Collection[str]):
  """Checks that a name is one of the known ones."""
  require(
    isinstance(value, str) and value in choices,
    name,
    "be a known name",
    value,
    " or ".join(repr(c) for c in sorted(choices)),
  )


def check_shape(
  name: str, array: Any, axes: Sequence[str], sizes: Sequence[int | None]
):
  """Checks an array's rank and sizes; a size of None accepts any."""
  shape = tuple(jnp.shape(array))
  layout = "[" + ", ".join(axes) + "]"
  if len(shape) != len(axes):
    raise ValueError(
      f"{name} must have shape {layout}; got {shape}; "
      f"expected {len(axes)} axes."
    )
  for axis, got, size in zip(axes, shape, sizes, strict=True):
    if size is not None and got != size:
      raise ValueError(
        f"{name} must have shape {layout}; got {shape}; expected {axis}={size}."
      )


def concrete(value: Any) -> np.ndarray | None:
  """The numbers of `value`, or None where it is being traced."""
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value)):
    return None
  return np.asarray(value)


def check_open_interval(name: str, value: Any, low: float, high: float):
  """Checks that numbers lie strictly between two bounds, unless traced."""
  numbers_ = concrete(value)
  if numbers_ is None:
    return
  ok = bool(np.all((numbers_ > low) & (numbers_ < high)))
  bound = f"({low:g}, {high:g})" if math.isfinite(high) else f"> {low:g}"
  rule = f"be in {bound}" if math.isfinite(high) else f"be {bound}"
  require(ok, name, rule, numbers_.tolist())


def check_covariance(name: str, value: Any, *, rtol: float = 1e-5):
  """Checks that a matrix is finite, symmetric and positive definite.

  Args:
    name: of the argument.
    value: [dim, dim]; a traced one is only checked for its shape.
    rtol: allowed asymmetry, relative to the largest entry.

  Raises:
    ValueError: not square, not finite, asymmetric or indefinite.
  """
  check_shape(name, value, ("dim", "dim"), (None, jnp.shape(value)[-1]))
  matrix = concrete(value)
  if matrix is None:
    return
  matrix = matrix.astype(np.float64)
  require(bool(np.all(np.isfinite(matrix))), name, "be finite", "a matrix")
  gap = float(np.max(np.abs(matrix - matrix.T)))
  scale = float(np.max(np.abs(matrix)))
  require(
    gap <= rtol * scale,
    name,
    "be symmetric",
    f"a matrix with max |A - A^T| = {gap:.3g}",
    f"at most {rtol:g} of max |A| = {scale:.3g}; use (A + A^T) / 2",
  )
  lowest = float(np.linalg.eigvalsh(matrix)[0])
  require(
    lowest > 0,
    name,
    "be positive definite",
    f"a matrix with lowest eigenvalue {lowest:.3g}",
    "all eigenvalues > 0",
  )
