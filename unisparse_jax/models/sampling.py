# SPDX-License-Identifier: Apache-2.0
"""How the next token is drawn from logits; each way is a frozen dataclass."""

import dataclasses
import math
import numbers
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checks


@runtime_checkable
class Sampler(Protocol):
  """A frozen dataclass, hashable: static under jit."""

  @property
  def needs_key(self) -> bool:
    """Whether `__call__` draws random numbers."""
    ...

  def probabilities(
    self, logits: Float[Array, "... vocab_size"]
  ) -> Float[Array, "... vocab_size"]:
    """The distribution that tokens are drawn from, float32."""
    ...

  def __call__(
    self, logits: Float[Array, "... vocab_size"], rng_key: Array | None
  ) -> Int[Array, "..."]:
    """Draws int32 tokens."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
  """The token of the highest logit; the first one of a tie."""

  @property
  def needs_key(self) -> bool:
    return False

  def probabilities(self, logits):
    return jax.nn.one_hot(
      jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32
    )

  def __call__(self, logits, rng_key=None):
    del rng_key
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
  """softmax(logits / temperature).

  Attributes:
    temperature: above 0, dimensionless.
  """

  temperature: float = 1.0

  def __post_init__(self):
    value = self.temperature
    checks.require(
      isinstance(value, numbers.Real) and math.isfinite(value) and value > 0,
      "temperature",
      "be a finite number > 0",
      value,
    )

  @property
  def needs_key(self) -> bool:
    return True

  def probabilities(self, logits):
    return jax.nn.softmax(self._adjust(logits), axis=-1)

  def __call__(self, logits, rng_key):
    adjusted = self._adjust(logits)
    return jax.random.categorical(rng_key, adjusted).astype(jnp.int32)

  def _adjust(self, logits):
    """Logits of the distribution that is drawn from, float32."""
    return logits.astype(jnp.float32) / jnp.float32(self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Temperature):
  """Temperature over the `top_k` likeliest tokens; ties go to the first.

  Attributes:
    top_k: tokens kept, at least 1.
    temperature: above 0.
  """

  top_k: int

  def __post_init__(self):
    super().__post_init__()
    checks.check_positive_int("top_k", self.top_k)

  def _adjust(self, logits):
    logits = super()._adjust(logits)
    return _keep(logits, lambda rank, _: rank < self.top_k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopP(Temperature):
  """Temperature over the fewest tokens whose probability reaches `top_p`.

  Attributes:
    top_p: probability mass to keep, in (0, 1].
    temperature: above 0; applied before the mass is measured.
  """

  top_p: float

  def __post_init__(self):
    super().__post_init__()
    checks.check_fraction("top_p", self.top_p)

  def _adjust(self, logits):
    logits = super()._adjust(logits)
    # The token that crosses top_p is kept, so at least one is.
    return _keep(logits, lambda _, mass_before: mass_before < self.top_p)


def _keep(logits, rule):
  """Sets a logit to -inf unless rule(rank, mass of likelier tokens)."""
  order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
  by_rank = jnp.take_along_axis(logits, order, axis=-1)
  probabilities = jax.nn.softmax(by_rank, axis=-1)
  mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
  rank = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  kept = jnp.where(rule(rank, mass_before), by_rank, -jnp.inf)
  return jnp.put_along_axis(logits, order, kept, axis=-1, inplace=False)
