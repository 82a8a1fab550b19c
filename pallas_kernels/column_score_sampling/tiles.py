# SPDX-License-Identifier: Apache-2.0
"""Which tiles of rows a tile of keys meets; shared by the kernels."""

import jax.numpy as jnp
from jax import lax


def row_tile_ranges(last_keys, num_key_tiles, tile_rows, tile_keys):
  """Row tiles to visit for each tile of keys, and which of them need no mask.

  Args:
    last_keys: int32 [batch, num_rows], a multiple of tile_rows; the last key
      that each row sees.
    num_key_tiles: number of key tiles.
    tile_rows: rows of a tile.
    tile_keys: keys of a tile.

  Returns:
    first, int32 [batch, num_key_tiles]: no row of a tile before it sees any of
    the keys. full, int32 [batch, num_key_tiles], >= first: every row of it and
    of the tiles after it sees all of them. With rows in ascending order of
    position nothing is visited in vain.
  """
  batch = last_keys.shape[0]
  by_tile = last_keys.reshape(batch, 1, -1, tile_rows)
  start = jnp.arange(num_key_tiles, dtype=jnp.int32)[None, :, None] * tile_keys
  is_hidden = (by_tile.max(-1) < start).astype(jnp.int32)
  is_full = (by_tile.min(-1) >= start + tile_keys - 1).astype(jnp.int32)
  first = lax.cumprod(is_hidden, axis=2).sum(-1)
  num_full = lax.cumprod(is_full, axis=2, reverse=True).sum(-1)
  return first, jnp.maximum(first, by_tile.shape[2] - num_full)
