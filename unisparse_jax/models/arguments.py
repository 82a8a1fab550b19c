# SPDX-License-Identifier: Apache-2.0
"""Arguments of generation: checked and converted before anything runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks


def as_tokens(tokens: Any) -> jax.Array:
  """int32 [batch, q_len] from anything like an array of integers."""
  tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
  checks.check_shape("tokens", tokens, ("batch", "q_len"), (None, None))
  checks.require(
    jnp.issubdtype(tokens.dtype, jnp.integer),
    "tokens",
    "have an integer dtype",
    tokens.dtype.name,
  )
  checks.require(tokens.size > 0, "tokens", "hold a token", tokens.shape)
  return jnp.asarray(tokens, jnp.int32)


def as_lengths(lengths: Any, batch: int, q_len: int) -> jax.Array | None:
  """int32 [batch] with values in [1, q_len], or None for None."""
  if lengths is None:
    return None
  if not isinstance(lengths, jax.Array):  # no transfer from a device for this
    lengths = np.asarray(lengths)
    checks.require(
      bool(np.all((lengths >= 1) & (lengths <= q_len))),
      "lengths",
      "be in [1, q_len]",
      lengths.tolist(),
      f"q_len={q_len}",
    )
  return checks.per_row("lengths", lengths, batch)


def as_eos_ids(eos_id: Any, vocab_size: int) -> tuple[int, ...]:
  """One token, several or None as a tuple of tokens of the vocabulary."""
  if eos_id is None:
    return ()
  eos_ids = np.atleast_1d(np.asarray(eos_id))
  ok = (
    eos_ids.size > 0
    and np.issubdtype(eos_ids.dtype, np.integer)
    and bool(np.all((eos_ids >= 0) & (eos_ids < vocab_size)))
  )
  checks.require(
    ok,
    "eos_id",
    "be a token or tokens of the vocabulary",
    eos_id,
    f"0 to {vocab_size - 1}",
  )
  return tuple(int(x) for x in eos_ids.ravel())


def check_hashable(name: str, value: Any):
  """Raises `ValueError` unless a value can be static under jit."""
  try:
    hash(value)
  except TypeError as error:
    raise ValueError(
      f"{name} must be hashable, such as a frozen dataclass; got "
      f"{type(value).__name__}."
    ) from error
