# SPDX-License-Identifier: Apache-2.0
"""The decoder on a few tokens at once, against a cache that it only reads.

One token is a decoding step, a lower-triangular mask a prefill, an ancestor
mask a draft tree: the same code, so the three cannot disagree.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels import checks
from unisparse_jax import attention
from unisparse_jax.models import decoder, kv_cache, rope

# XLA turns products of one row into reductions: on an H200 a step of the 155M
# model takes 1.67 ms with one row and 1.29 ms with 16.
_LEAST_ROWS = {"gpu": 16}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeCache:
  """Keys and values with heads before slots, as a decoding step reads them.

  With slots before heads, a batched product over (batch, head) has to copy the
  whole cache first.

  Attributes:
    k: per layer [batch, num_kv_heads, capacity, head_dim], after RoPE.
    v: as k. Slots at or past `lengths` are junk, but finite.
    lengths: int32 [batch], valid tokens of each row.
  """

  k: tuple[Float[Array, "batch num_kv_heads capacity head_dim"], ...]
  v: tuple[Float[Array, "batch num_kv_heads capacity head_dim"], ...]
  lengths: Int[Array, " batch"]

  @property
  def capacity(self) -> int:
    """Tokens that a row can hold."""
    return self.k[0].shape[2]

  @classmethod
  def from_cache(cls, cache: kv_cache.KVCache) -> "TreeCache":
    """The same tokens in this layout."""
    k, v = (
      tuple(jnp.swapaxes(x, 1, 2) for x in buffers)
      for buffers in (cache.k, cache.v)
    )
    return cls(k=k, v=v, lengths=cache.lengths)

  def to_cache(self) -> kv_cache.KVCache:
    """The same tokens in the layout of prefill."""
    k, v = (
      tuple(jnp.swapaxes(x, 1, 2) for x in buffers)
      for buffers in (self.k, self.v)
    )
    return kv_cache.KVCache(k=k, v=v, lengths=self.lengths)

  def append(
    self,
    k: Sequence[Float[Array, "batch n num_kv_heads head_dim"]],
    v: Sequence[Float[Array, "batch n num_kv_heads head_dim"]],
    counts: Int[Array, " batch"],
    *,
    num_slots: int,
  ) -> "TreeCache":
    """Takes the first counts[b] of n tokens a row; writes `num_slots` of them.

    There must be room for as many past every length: XLA would move the write
    back onto valid slots. One token past the end replaces the last one.
    """
    written = pallas_kernels.cache_append(
      (*self.k, *self.v), (*k, *v), self.lengths, num_slots=num_slots
    )
    num_layers = len(self.k)
    return TreeCache(
      k=written[:num_layers],
      v=written[num_layers:],
      lengths=self.lengths + counts,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
  """The first tokens of each row of [batch, n], in one flat row.

  Attributes:
    counts: int32 [batch], how many tokens of each row are there.
    starts: int32 [batch], where in the flat row they begin.
    flat: int32 [packed], row * n + column of each packed token.
    slot: int32 [batch, n], where a token went in the flat row; `packed` for
      those left out.
  """

  counts: Int[Array, " batch"]
  starts: Int[Array, " batch"]
  flat: Int[Array, " packed"]
  slot: Int[Array, "batch n"]

  @classmethod
  def of(cls, counts: Int[Array, " batch"], n: int, packed: int) -> "Packing":
    """Packs row after row; `packed` must be at least the sum of counts.

    Args:
      counts: int32 [batch], 0 to n.
      n: static number of tokens of a row.
      packed: static size of the flat row; what is left of it repeats token 0.
    """
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    column = jnp.arange(n, dtype=jnp.int32)[None, :]
    slot = jnp.where(column < counts[:, None], starts[:, None] + column, packed)
    index = jnp.arange(slot.size, dtype=jnp.int32).reshape(slot.shape)
    flat = jnp.zeros((packed,), jnp.int32).at[slot].set(index, mode="drop")
    return cls(counts=counts, starts=starts, flat=flat, slot=slot)

  def pack(self, values: Array) -> Array:
    """[batch, n, ...] to [1, packed, ...]."""
    rows = values.reshape(-1, *values.shape[2:])
    return rows[self.flat][None]

  def unpack(self, values: Array) -> Array:
    """[1, packed, ...] to [batch, n, ...]; zeros for what was left out."""
    return jnp.take(values[0], self.slot, axis=0, mode="fill", fill_value=0)

  def take(self, values: Array, columns: Int[Array, "batch m"]) -> Array:
    """[1, packed, ...] to [batch, m, ...], the tokens at these columns.

    Those of columns at or past a row's count are some other's.
    """
    slot = self.starts[:, None] + columns
    return values[0][jnp.minimum(slot, values.shape[1] - 1)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
  """Keys and values of tree nodes that earlier passes computed.

  Attributes:
    k: per layer [batch, num_slots, num_kv_heads, head_dim].
    v: as k; every slot must be finite.
  """

  k: tuple[Float[Array, "batch num_slots num_kv_heads head_dim"], ...]
  v: tuple[Float[Array, "batch num_slots num_kv_heads head_dim"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeOutput:
  """What `tree_forward` found; with a packing, [1, packed, ...] of everything.

  Attributes:
    hidden: [batch, n, embed_dim] for `Decoder.logits`.
    k: per layer [batch, m, num_kv_heads, head_dim], after RoPE; with a scratch,
      all of its slots, else m is n. On a GPU it is more where batch * n < 16:
      padding behind the n, which XLA would take a copy a layer to cut off.
    v: as k.
    taps: [batch, n, len(taps) * embed_dim], or None for no taps.
  """

  hidden: Float[Array, "batch n embed_dim"]
  k: tuple[Float[Array, "batch m num_kv_heads head_dim"], ...]
  v: tuple[Float[Array, "batch m num_kv_heads head_dim"], ...]
  taps: Float[Array, "batch n taps_dim"] | None


def tree_forward(
  model: decoder.Decoder,
  tokens: Int[Array, "batch n"],
  positions: Int[Array, "batch n"],
  mask: Bool[Array, "batch n n"],
  cache: TreeCache,
  *,
  taps: Sequence[int] = (),
  packing: Packing | None = None,
  counts: Int[Array, " batch"] | None = None,
  scratch: Scratch | None = None,
  slot: int | Int[Array, ""] = 0,
) -> TreeOutput:
  """Runs tokens that see the cache and, under `mask`, one another.

  Args:
    model: a decoder.
    tokens: int32 [batch, n].
    positions: int32 [batch, n], absolute.
    mask: bool [batch, n, n], [i, j]: token i sees token j; i must see itself.
      With a scratch, [batch, n, num_slots] over its slots.
    cache: earlier tokens; only read.
    taps: layers whose input is returned as well.
    packing: compute only some tokens, which must see no others, in a flat row.
    counts: int32 [batch], as of `attention.tree_attention`: the tokens of each
      row that matter, a prefix. Not with a scratch or a packing.
    scratch: where the new keys and values go before attention. Not with a
      packing.
    slot: first slot of the new tokens there.

  Returns:
    See `TreeOutput`. Values of tokens that do not count, and behind the last
    in a flat row, are finite and nothing more.
  """
  axes = ("batch", "n")
  checks.check_shape("tokens", tokens, axes, (None, None))
  batch, n = tokens.shape
  checks.check_shape("positions", positions, axes, (batch, n))
  seen = n if scratch is None else scratch.k[0].shape[1]
  checks.check_shape("mask", mask, (*axes, "seen"), (batch, n, seen))
  num_layers = len(model.layers)
  checks.require(
    len(cache.k) == num_layers and cache.k[0].shape[0] == batch,
    "cache",
    "have the model's layers and the tokens' batch",
    (len(cache.k), cache.k[0].shape[0]),
    str((num_layers, batch)),
  )
  least = _LEAST_ROWS.get(jax.default_backend(), 1)
  if packing is None and scratch is None and batch * n < least:
    return _padded(
      model, tokens, positions, mask, cache, taps, counts, -(-least // batch)
    )
  pack, starts = (lambda x: x), None
  if packing is not None:
    pack, counts, starts = packing.pack, packing.counts, packing.starts
  cos, sin = rope.cos_sin(pack(positions), model.config)
  x = model.embed(pack(tokens))
  inputs, keys, values = [], [], []
  for layer, block in enumerate(model.layers):
    inputs.append(x)

    def attend(q, k, v, layer=layer):
      if scratch is not None:
        k = _write_slots(scratch.k[layer], k, slot)
        v = _write_slots(scratch.v[layer], v, slot)
      keys.append(k)
      values.append(v)
      buffers = cache.k[layer], cache.v[layer], cache.lengths
      return attention.tree_attention(q, *buffers, k, v, mask, counts, starts)

    x, _, _ = block.attend_with(x, cos, sin, attend)
  inputs.append(x)
  out = TreeOutput(
    hidden=model.norm(x),
    k=tuple(keys),
    v=tuple(values),
    taps=decoder.join_taps(inputs, taps),
  )
  # Keys leave only when the last layer has read its cache. Without this, XLA
  # may order a write of the first layer before a read, and copies every buffer
  # at every step to be safe (seen in the compiled loop, JAX 0.11.2, CPU).
  return lax.optimization_barrier(out)


def _write_slots(buffer, new, slot):
  """[batch, num_slots, ...] with the slots of `new` from `slot` on replaced.

  By writing all of it, which is small: a contiguous slice, that of one row, a
  GPU copies on another stream, and the graph of the step ends there.
  """
  index = jnp.arange(buffer.shape[1], dtype=jnp.int32) - slot
  is_new = (index >= 0) & (index < new.shape[1])
  values = jnp.take(new, index, axis=1, mode="clip").astype(buffer.dtype)
  return jnp.where(is_new[None, :, None, None], values, buffer)


def _padded(model, tokens, positions, mask, cache, taps, counts, size):
  """`tree_forward` with the last token repeated; nothing sees the copies."""
  n = tokens.shape[1]
  more = ((0, 0), (0, size - n))
  out = tree_forward(
    model,
    jnp.pad(tokens, more, mode="edge"),
    jnp.pad(positions, more, mode="edge"),
    jnp.pad(
      jnp.pad(mask, (*more, (0, 0)), mode="edge"), ((0, 0), (0, 0), more[1])
    ),
    cache,
    taps=taps,
    counts=counts,
  )
  hidden, taps = jax.tree.map(lambda x: x[:, :n], (out.hidden, out.taps))
  return dataclasses.replace(out, hidden=hidden, taps=taps)
