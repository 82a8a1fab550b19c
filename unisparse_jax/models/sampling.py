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
    return jax.nn.softmax(self.adjust(logits), axis=-1)

  def __call__(self, logits, rng_key):
    adjusted = self.adjust(logits)
    return jax.random.categorical(rng_key, adjusted).astype(jnp.int32)

  def adjust(self, logits):
    """float32 logits of the distribution that tokens are drawn from."""
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

  def adjust(self, logits):
    logits = super().adjust(logits)
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

  def adjust(self, logits):
    logits = super().adjust(logits)
    # The token that crosses top_p is kept, so at least one is.
    return _keep(logits, lambda _, mass_before: mass_before < self.top_p)


def row_keys(rng_key: Array, batch: int) -> Array:
  """One key a request: [batch] keys as they are, or made from one key.

  Raises:
    ValueError: not one typed key, nor [batch] of them.
  """
  is_typed = isinstance(rng_key, jax.Array) and jnp.issubdtype(
    rng_key.dtype, jax.dtypes.prng_key
  )
  if isinstance(rng_key, jax.Array) and not is_typed:
    rng_key = jax.random.wrap_key_data(rng_key)
  checks.require(
    isinstance(rng_key, jax.Array) and rng_key.shape in ((), (batch,)),
    "rng_key",
    "be a key, or one for each row",
    jax.typeof(rng_key),
    f"shape () or ({batch},)",
  )
  if rng_key.shape == (batch,):
    return rng_key
  rows = jnp.arange(batch, dtype=jnp.uint32)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng_key, rows)


def noise_at(
  keys: Array, positions: Int[Array, "batch ..."], vocab_size: int
) -> Float[Array, "batch ... vocab_size"]:
  """Gumbel noise that depends on a request and a token's position alone.

  Whatever decodes the request, in whatever batch, then draws the same token
  from the same logits.

  Args:
    keys: one a request, [batch].
    positions: int32 [batch, ...], absolute position of the token to draw.
    vocab_size: number of tokens.

  Returns:
    float32 [batch, ..., vocab_size].
  """

  def draw(key, position):
    key = jax.random.fold_in(key, position)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)

  for _ in range(positions.ndim - 1):
    draw = jax.vmap(draw, in_axes=(None, 0))
  return jax.vmap(draw)(keys, positions)


def draw_with_noise(
  sampler: Sampler,
  logits: Float[Array, "... vocab_size"],
  noise: Float[Array, "... vocab_size"] | None,
) -> Int[Array, "..."]:
  """The token that a sampler draws with given Gumbel noise, int32.

  argmax(log p + noise) is a draw from p (the Gumbel-max trick).
  """
  if not sampler.needs_key:
    return sampler(logits, None)
  assert noise is not None, "a sampler that needs a key needs noise"
  if isinstance(sampler, Temperature):
    log_p = sampler.adjust(logits)
  else:
    log_p = jnp.log(sampler.probabilities(logits))
  return jnp.argmax(log_p + noise, axis=-1).astype(jnp.int32)


def _keep(logits, rule):
  """Sets a logit to -inf unless rule(rank, mass of likelier tokens)."""
  order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
  by_rank = jnp.take_along_axis(logits, order, axis=-1)
  probabilities = jax.nn.softmax(by_rank, axis=-1)
  mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
  rank = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  kept = jnp.where(rule(rank, mass_before), by_rank, -jnp.inf)
  return jnp.put_along_axis(logits, order, kept, axis=-1, inplace=False)
