# SPDX-License-Identifier: Apache-2.0
"""A small video reader: an encoder over tiles, and questions that look at it.

Both attend by Flax's own `nnx.MultiHeadAttention`, which is given an attention
of ours as a value: all tiles see one another, and the questions see all tiles.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.vision import vision_attention_data as data_lib
from pallas_kernels import checks
from unisparse_jax import attention

_PIXEL_MEAN, _PIXEL_SCALE = 0.2, 0.25  # textures become -0.8 and 0.8
_SHARPNESS = 1.4  # of the first query and key weights
Memory = Float[Array, "batch num_tokens embed_dim"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes of the reader.

  Attributes:
    embed_dim: width.
    mlp_dim: hidden width of the feed-forward parts.
    num_heads: of every attention; divides embed_dim.
    num_layers: of the encoder. The questions look once, so that what has to be
      found twice over must be found by the encoder first.
  """

  embed_dim: int = 128
  mlp_dim: int = 256
  num_heads: int = 4
  num_layers: int = 2

  def __post_init__(self):
    for name in ("embed_dim", "mlp_dim", "num_heads", "num_layers"):
      checks.check_positive_int(name, getattr(self, name))
    checks.check_divides(
      "num_heads", self.num_heads, "embed_dim", self.embed_dim
    )


class FeedForward(nnx.Module):
  """Two layers with a GELU between."""

  def __init__(self, d_in: int, hidden: int, d_out: int, *, rngs: nnx.Rngs):
    self.up = nnx.Linear(d_in, hidden, rngs=rngs)
    self.down = nnx.Linear(hidden, d_out, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
  """Attention and a feed-forward part, each on a normalised input."""

  def __init__(self, config: ModelConfig, attention_fn, *, rngs: nnx.Rngs):
    dim = config.embed_dim
    self.norm = nnx.LayerNorm(dim, rngs=rngs)
    self.attend = nnx.MultiHeadAttention(
      config.num_heads,
      dim,
      decode=False,
      attention_fn=attention.as_flax_attention(attention_fn, causal=False),
      rngs=rngs,
    )
    # Like looks for like from the start, sharply, and places are loud: of 4
    # frames the search is then learnt in 100 steps. Not so in 250 with equal
    # weights alone, nor without them.
    kernel = _SHARPNESS * self.attend.query.kernel[...]
    self.attend.query.kernel[...] = kernel
    self.attend.key.kernel[...] = jnp.copy(kernel)
    self.norm_mlp = nnx.LayerNorm(dim, rngs=rngs)
    self.mlp = FeedForward(dim, config.mlp_dim, dim, rngs=rngs)

  def __call__(self, x: Array, memory: Memory | None = None) -> Array:
    """Looks at `memory`, or at x itself."""
    h = self.norm(x)
    x = x + self.attend(h, h if memory is None else memory)
    return x + self.mlp(self.norm_mlp(x))


class VideoReader(nnx.Module):
  """Reads a video, then answers questions about it.

  Args:
    config: sizes.
    video: sizes of what it reads.
    self_attention: how tiles look at tiles, in every layer of the encoder.
    cross_attention: how questions look at tiles.
    rngs: of the weights.
  """

  def __init__(
    self,
    config: ModelConfig,
    video: data_lib.VideoConfig,
    *,
    self_attention: attention.AttentionFn,
    cross_attention: attention.AttentionFn,
    rngs: nnx.Rngs,
  ):
    dim, num_pixels = config.embed_dim, data_lib.TILE**2
    self._columns = video.columns
    self.look = nnx.Linear(num_pixels, dim, rngs=rngs)
    self.recognise = FeedForward(num_pixels, config.mlp_dim, dim, rngs=rngs)
    self.row = _embed(video.rows, dim, 0.7, rngs)
    self.column = _embed(video.columns, dim, 0.7, rngs)
    # The last is that of a question which names no time.
    self.time = _embed(video.max_frames + 1, dim, 1.0, rngs)
    self.encoder = nnx.List(
      Block(config, self_attention, rngs=rngs) for _ in range(config.num_layers)
    )
    self.norm_memory = nnx.LayerNorm(dim, rngs=rngs)
    self.ask = Block(config, cross_attention, rngs=rngs)
    self.norm = nnx.LayerNorm(dim, rngs=rngs)
    self.answer = nnx.Linear(dim, data_lib.NUM_DIGITS, rngs=rngs)

  def encode(
    self,
    pixels: Float[Array, "batch num_tokens pixels"],
    times: Int[Array, "batch num_frames"],
  ) -> Memory:
    """What the tiles hold once they have looked at one another."""
    num_tiles = pixels.shape[1] // times.shape[1]
    tile = jnp.arange(num_tiles, dtype=jnp.int32)[None]
    place = jnp.tile(self._place(tile), (1, times.shape[1], 1))
    x = self._see(pixels) + place
    for block in self.encoder:
      x = block(x)
    # Questions ask for places and times: both are said again, as in DETR.
    time = jnp.repeat(self.time(times), num_tiles, axis=1)
    return self.norm_memory(x) + place + time

  def decode(
    self,
    memory: Memory,
    examples: Float[Array, "batch num_questions pixels"],
    asked_times: Int[Array, "batch num_questions"],
    asked_tiles: Int[Array, "batch num_questions"],
  ) -> Float[Array, "batch num_questions num_digits"]:
    """Logits of the answers."""
    x = self._see(examples) + self._place(asked_tiles) + self.time(asked_times)
    return self.answer(self.norm(self.ask(x, memory)))

  def name_tiles(
    self, memory: Memory
  ) -> Float[Array, "batch num_tiles num_digits"]:
    """Logits of each tile's own answer; only training asks for them."""
    return self.answer(self.norm(memory))

  def _see(self, pixels):
    pixels = (pixels - _PIXEL_MEAN) / _PIXEL_SCALE
    return self.look(pixels) + self.recognise(pixels)

  def _place(self, tiles):
    return self.row(tiles // self._columns) + self.column(tiles % self._columns)


def make(
  config: ModelConfig,
  video: data_lib.VideoConfig,
  *,
  self_attention: attention.AttentionFn | None = None,
  cross_attention: attention.AttentionFn | None = None,
  seed: int = 0,
) -> VideoReader:
  """A reader with new weights; attention is dense where none is given."""
  dense = attention.DenseAttention(implementation="xla")
  return VideoReader(
    config,
    video,
    self_attention=self_attention or dense,
    cross_attention=cross_attention or dense,
    rngs=nnx.Rngs(seed),
  )


def weights(reader: VideoReader) -> dict:
  """A reader's weights as a nested dict of arrays."""
  return nnx.to_pure_dict(nnx.state(reader))


def with_attention(
  params,
  config: ModelConfig,
  video: data_lib.VideoConfig,
  *,
  self_attention: attention.AttentionFn,
  cross_attention: attention.AttentionFn,
) -> VideoReader:
  """A reader with given weights that attends in another way.

  Args:
    params: nested dict of arrays, as `weights` gives.
    config: sizes.
    video: sizes of what it reads.
    self_attention: how tiles look at tiles.
    cross_attention: how questions look at tiles.
  """
  graphdef, _ = nnx.split(
    nnx.eval_shape(
      lambda: make(
        config,
        video,
        self_attention=self_attention,
        cross_attention=cross_attention,
      )
    )
  )
  return nnx.merge(graphdef, nnx.State(params))


def _embed(count, dim, scale, rngs) -> nnx.Embed:
  init = nnx.initializers.normal(scale)  # not much below a tile's looks
  return nnx.Embed(count, dim, embedding_init=init, rngs=rngs)
