# SPDX-License-Identifier: Apache-2.0
"""The one wording of argument errors in both packages."""

import math
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def require(ok: bool, name: str, rule: str, got: Any, expected: str = ""):
  """Raises "<name> must <rule>; got <name>=<got>; ..." unless ok."""
  if not ok:
    tail = f"; expected {expected}" if expected else ""
    raise ValueError(f"{name} must {rule}; got {name}={got!r}{tail}.")


def check_shape(
  name: str, array: Any, axes: Sequence[str], sizes: Sequence[int | None]
):
  """Checks an array's rank and sizes; a size of None accepts any."""
  shape = tuple(array.shape)
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


def check_dtype(name: str, dtype: Any, allowed: Collection[str]):
  """Checks that a dtype is one of the named ones."""
  got = jnp.dtype(dtype).name
  if got not in allowed:
    raise ValueError(
      f"{name} must have dtype {' or '.join(sorted(allowed))}; got {got}."
    )


def check_divides(name: str, value: int, other_name: str, other: int):
  """Checks that `value` divides `other`."""
  if value <= 0 or other % value:
    raise ValueError(
      f"{name} must divide {other_name}; got {name}={value}, "
      f"{other_name}={other}; expected {other_name} % {name} == 0."
    )


def check_positive_int(name: str, value: Any):
  """Checks that a static setting is an integer of at least 1."""
  ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  ok = ok and int(value) >= 1
  require(ok, name, "be an integer >= 1", value)


def check_non_negative_int(name: str, value: Any):
  """Checks that a static setting is an integer of at least 0."""
  ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  ok = ok and int(value) >= 0
  require(ok, name, "be an integer >= 0", value)


def check_fraction(name: str, value: Any):
  """Checks that a static setting lies in (0, 1]; NaN does not."""
  ok = isinstance(value, numbers.Real) and 0.0 < float(value) <= 1.0
  require(ok, name, "be in (0, 1]", value)


def check_fractions(name: str, value: Any):
  """Checks a fraction in (0, 1], or a tuple of them, one a head."""
  if isinstance(value, tuple):
    require(len(value) > 0, name, "not be empty", value)
    for item in value:
      check_fraction(name, item)
  else:
    check_fraction(name, value)


def check_scale(scale: Any):
  """Checks that a softmax scale is None or a finite positive number."""
  ok = scale is None or (
    isinstance(scale, numbers.Real) and 0 < float(scale) < math.inf
  )
  require(ok, "scale", "be None or a finite number > 0", scale)


def check_choice(name: str, value: Any, choices: Collection[str]):
  """Checks that a name is one of the known ones."""
  require(
    value in choices,
    name,
    "be a known name",
    value,
    " or ".join(repr(c) for c in sorted(choices)),
  )


def check_qkv(q: Any, k: Any, v: Any | None):
  """Checks the shapes and dtypes that every attention op shares.

  Args:
    q: [batch, q_len, num_heads, head_dim].
    k: [batch, kv_len, num_kv_heads, head_dim].
    v: [batch, kv_len, num_kv_heads, head_dim], or None where only scores count.

  Raises:
    ValueError: an argument is off; the message names it.
  """
  check_shape("q", q, ("batch", "q_len", "num_heads", "head_dim"), (None,) * 4)
  batch, q_len, num_heads, head_dim = q.shape
  kv_axes = ("batch", "kv_len", "num_kv_heads", "head_dim")
  check_shape("k", k, kv_axes, (batch, None, None, head_dim))
  require(q_len >= 1, "q", "have q_len >= 1", tuple(q.shape))
  require(k.shape[1] >= 1, "k", "have kv_len >= 1", tuple(k.shape))
  check_divides("num_kv_heads", k.shape[2], "num_heads", num_heads)
  check_dtype("q", q.dtype, ("float32", "bfloat16", "float16"))
  check_dtype("k", k.dtype, (jnp.dtype(q.dtype).name,))
  if v is not None:
    check_shape("v", v, kv_axes, (batch, k.shape[1], k.shape[2], head_dim))
    check_dtype("v", v.dtype, (jnp.dtype(q.dtype).name,))


def per_row(name: str, value: Any, batch: int) -> jax.Array:
  """A scalar or [batch] integer as int32 [batch]; ValueError otherwise."""
  value = jnp.asarray(value)
  ok = jnp.issubdtype(value.dtype, jnp.integer) and (
    value.shape in ((), (batch,))
  )
  require(
    bool(ok),
    name,
    "be an integer, or integers of shape [batch]",
    jax.typeof(value),
    f"shape () or ({batch},)",
  )
  return jnp.broadcast_to(value.astype(jnp.int32), (batch,))
