# SPDX-License-Identifier: Apache-2.0
"""Choice of a back end by name: the only place where an op falls through."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels import checks

Implementation = str | Sequence[str] | None

# Ops deep inside a decoding loop: no argument reaches them.
PREFERABLE = (
  "cache_append",
  "head_rotation",
  "top_log_probs",
  "tree_attention",
)
# JAX keeps the value in the key of every compiled function.
_preferences = jax.make_user_context(())


def preferring(
  **implementations: Implementation,
) -> contextlib.AbstractContextManager[None]:
  """Back ends that ops of `PREFERABLE` take where the caller names none.

      with dispatch.preferring(tree_attention="triton"):
        tokens = models.generate(...)

  What was compiled outside the context is compiled anew inside, and found
  again outside. Contexts nest; threads do not see one another's.

  Args:
    **implementations: op to back end, as its `implementation`; None: its own
      default again.

  Returns:
    The context.

  Raises:
    ValueError: an unknown op. An unknown back end raises where it is called.
  """
  chosen = dict(_preferences.value)
  for op, names in implementations.items():
    checks.check_choice("op", op, PREFERABLE)
    is_plain = names is None or isinstance(names, str)
    chosen[op] = names if is_plain else tuple(names)
  return _preferences(tuple(sorted(chosen.items())))


def preferred(op: str) -> Implementation:
  """What `preferring` names for an op; None for the platform's default."""
  assert op in PREFERABLE, "an op that asks is listed"
  return dict(_preferences.value).get(op)


def platform_default(table: Mapping[str, Any]) -> tuple[str, ...]:
  """Names to try, in order, when the caller names none.

  Args:
    table: the op's back ends.

  Returns:
    The platform's kernels that the op has, then "xla" (or "reference" where
    the op has no separate "xla").
  """
  kernels = {
    "gpu": ("mosaic_gpu", "triton"),
    "cuda": ("mosaic_gpu", "triton"),
    "tpu": ("mosaic_tpu",),
  }.get(jax.default_backend(), ())
  last = "xla" if "xla" in table else "reference"
  return (*(name for name in kernels if name in table), last)


def dispatch(
  table: Mapping[str, Callable[..., Any]],
  implementation: Implementation,
  *args: Any,
  **kwargs: Any,
) -> Any:
  """Calls the named back end; tries a sequence, or the default, in order.

  A back end that cannot serve the call raises `NotImplementedError`, and the
  next of a sequence is tried. A single named one never falls through.

  Args:
    table: back-end name to function.
    implementation: a name, a sequence of names, or None for this platform's
      default.
    *args: passed on.
    **kwargs: passed on.

  Returns:
    What the back end returns.

  Raises:
    ValueError: an unknown name.
    NotImplementedError: the single named back end refuses.
    ExceptionGroup: every back end of a sequence refused, with each reason.
  """
  if isinstance(implementation, str):
    checks.check_choice("implementation", implementation, table)
    return table[implementation](*args, **kwargs)
  names = platform_default(table) if implementation is None else implementation
  for name in names:
    checks.check_choice("implementation", name, table)
  refusals = []
  for name in names:
    try:
      return table[name](*args, **kwargs)
    except NotImplementedError as error:
      refusals.append(error)
  raise ExceptionGroup(f"no back end of {tuple(names)} serves this", refusals)
