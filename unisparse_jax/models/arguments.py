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


def as_limits(max_new_tokens: Any, batch: int) -> np.ndarray:
  """int32 [batch], all at least 1."""
  limit = np.asarray(max_new_tokens)
  ok = np.issubdtype(limit.dtype, np.integer) and limit.shape in ((), (batch,))
  checks.require(
    bool(ok and np.all(limit >= 1)),
    "max_new_tokens",
    "be an integer >= 1, or one for each row",
    max_new_tokens,
  )
  return np.broadcast_to(limit, (batch,)).astype(np.int32)


def as_reference(
  reference: Any, batch: int, new_tokens: int, vocab_size: int
) -> jax.Array | None:
  """int32 [batch, new_tokens] of tokens or -1, or None for None."""
  if reference is None:
    return None
  is_on_device = isinstance(reference, jax.Array)
  reference = reference if is_on_device else np.asarray(reference)
  axes = ("batch", "new_tokens")
  checks.check_shape("reference", reference, axes, (batch, new_tokens))
  checks.require(
    jnp.issubdtype(reference.dtype, jnp.integer),
    "reference",
    "have an integer dtype",
    reference.dtype.name,
  )
  if not is_on_device:  # no transfer from a device for this
    checks.require(
      bool(np.all((reference >= -1) & (reference < vocab_size))),
      "reference",
      "hold tokens of the vocabulary, or -1",
      f"{reference.min()} to {reference.max()}",
      f"-1 to {vocab_size - 1}",
    )
  return jnp.asarray(reference, jnp.int32)


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
