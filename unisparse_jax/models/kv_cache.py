# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens seen so far, in buffers of fixed size."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax.models import config as config_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
  """A key and a value buffer per layer; slots at or past `lengths` are junk.

  Attributes:
    k: per layer [batch, capacity, num_kv_heads, head_dim], after RoPE.
    v: as k.
    lengths: int32 [batch], valid tokens of each row.
  """

  k: tuple[Float[Array, "batch capacity num_kv_heads head_dim"], ...]
  v: tuple[Float[Array, "batch capacity num_kv_heads head_dim"], ...]
  lengths: Int[Array, " batch"]

  @classmethod
  def init(
    cls,
    config: config_lib.DecoderConfig,
    *,
    batch: int,
    capacity: int,
    dtype: DTypeLike = jnp.float32,
  ) -> "KVCache":
    """An empty cache for `batch` rows of up to `capacity` tokens."""
    checks.check_positive_int("batch", batch)
    checks.check_positive_int("capacity", capacity)
    shape = (batch, capacity, config.num_kv_heads, config.head_dim)
    layers = range(config.num_layers)
    return cls(
      k=tuple(jnp.zeros(shape, dtype) for _ in layers),
      v=tuple(jnp.zeros(shape, dtype) for _ in layers),
      lengths=jnp.zeros((batch,), jnp.int32),
    )

  @property
  def batch(self) -> int:
    """Number of rows."""
    return self.k[0].shape[0]

  @property
  def capacity(self) -> int:
    """Tokens that a row can hold."""
    return self.k[0].shape[1]

  @property
  def num_layers(self) -> int:
    """Number of layers."""
    return len(self.k)

  def check_room(self, num_tokens: int) -> int:
    """Raises if `num_tokens` more cannot fit, as far as that is known.

    Args:
      num_tokens: slots that each row needs past its length.

    Returns:
      The longest row's length, or 0 where lengths are unknown.

    Raises:
      ValueError: too many. Under jit lengths are unknown and only the capacity
        is compared; `Decoder` then returns NaN for a row that overflows.
    """
    used = 0
    if not isinstance(self.lengths, jax.core.Tracer):
      used = int(jax.device_get(self.lengths).max())
    checks.require(
      used + num_tokens <= self.capacity,
      "capacity",
      "hold the tokens in the cache and the new ones",
      self.capacity,
      f"capacity >= {used} + {num_tokens}",
    )
    return used

  def append(
    self,
    layer: int,
    k: Float[Array, "batch q_len num_kv_heads head_dim"],
    v: Float[Array, "batch q_len num_kv_heads head_dim"],
    *,
    is_empty: bool = False,
  ) -> "KVCache":
    """Writes one layer's new keys and values past each row's length.

    The lengths stay: call `advance` once all layers are written.

    Args:
      layer: index of the layer.
      k: [batch, q_len, num_kv_heads, head_dim].
      v: as k.
      is_empty: promise that every length is 0.

    Returns:
      The cache with the slots written.

    Raises:
      ValueError: a shape disagrees, or q_len exceeds the capacity.
    """
    batch, capacity, num_kv_heads, head_dim = self.k[layer].shape
    axes = ("batch", "q_len", "num_kv_heads", "head_dim")
    for name, array in (("k", k), ("v", v)):
      checks.check_shape(
        name, array, axes, (batch, None, num_kv_heads, head_dim)
      )
    checks.require(
      k.shape[1] <= capacity,
      "capacity",
      "be at least q_len",
      capacity,
      f"capacity >= {k.shape[1]}",
    )
    offsets = None if is_empty else self.lengths
    return dataclasses.replace(
      self,
      k=_replace(self.k, layer, _write(self.k[layer], k, offsets)),
      v=_replace(self.v, layer, _write(self.v[layer], v, offsets)),
    )

  def advance(self, num_tokens: int | Int[Array, " batch"]) -> "KVCache":
    """Makes the next slots of each row valid; scalar or [batch]."""
    num_tokens = checks.per_row("num_tokens", num_tokens, self.batch)
    return dataclasses.replace(self, lengths=self.lengths + num_tokens)

  def truncate(self, lengths: int | Int[Array, " batch"]) -> "KVCache":
    """Forgets the tokens past `lengths` (scalar or [batch]); never adds any."""
    lengths = checks.per_row("lengths", lengths, self.batch)
    return dataclasses.replace(self, lengths=jnp.clip(lengths, 0, self.lengths))


def _replace(buffers: tuple, index: int, buffer) -> tuple:
  return (*buffers[:index], buffer, *buffers[index + 1 :])


def _write(buffer, new, offsets):
  """Writes new[b] at buffer[b, offsets[b]:]; offsets of None are 0."""
  new = new.astype(buffer.dtype)
  if offsets is None:
    return lax.dynamic_update_slice(buffer, new, (0, 0, 0, 0))
  if buffer.shape[0] == 1:
    return lax.dynamic_update_slice(buffer, new, (0, offsets[0], 0, 0))

  def write_row(row, values, start):
    return lax.dynamic_update_slice(row, values, (start, 0, 0))

  return jax.vmap(write_row)(buffer, new, offsets)
