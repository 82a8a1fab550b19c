# SPDX-License-Identifier: Apache-2.0
"""Ways to score blocks of keys from composite tokens, one layer at a time.

Each takes q [len, num_heads, head_dim] and k [len, num_kv_heads, head_dim] of
one causal sequence whose length is a multiple of the block, and returns
float32 [num_mask_heads, num_q_blocks, num_kv_blocks], rows summing to 1.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unisparse_jax import attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composite:
  """Attention between composite tokens, and what may be changed in it.

  Attributes:
    window_q: queries in one composite.
    window_kv: keys in one composite.
    head_group: consecutive query heads in one composite.
    query: "mean" of a window, or its "last" query.
    key: "mean" of a window; "max", an upper bound of the window's logits from
      the largest and smallest value of each channel; "mean_max", halfway;
      "outlier", the key furthest from the mean apart from the mean of the rest.
    variance: "none"; "diagonal" or "full": add half the variance of the logits
      within a window of keys, from the channels' variances or covariances.
    temperature: factor of the composite logits.
    reduce: how a block's composite queries are put together: "mean" or "max".
    block: tokens in a block.
  """

  window_q: int = 16
  window_kv: int = 16
  head_group: int = 3
  query: str = "mean"
  key: str = "mean"
  variance: str = "none"
  temperature: float = 1.0
  reduce: str = "mean"
  block: int = 128

  def __call__(self, q, k):
    return _composite(self, q, k)


@functools.partial(jax.jit, static_argnums=0)
def _composite(settings: Composite, q, k):
  length, num_heads, dim = q.shape
  group, window = settings.head_group, settings.window_kv
  num_masks, num_kv_heads = num_heads // group, k.shape[1]
  q = q.reshape(-1, settings.window_q, num_masks, group, dim)
  q = q[:, -1:].mean((1, 3)) if settings.query == "last" else q.mean((1, 3))
  if num_masks < num_kv_heads:
    k = k.reshape(length, num_masks, -1, dim).mean(2)
  else:
    k = jnp.repeat(k, num_masks // num_kv_heads, axis=1)
  q *= settings.temperature * dim**-0.5
  windows = k.reshape(-1, window, num_masks, dim)
  mean = windows.mean(1)
  first_key = jnp.arange(len(windows), dtype=jnp.int32) * window
  per_block = settings.block // window
  weight = jnp.zeros((1,), jnp.float32)
  if settings.key == "outlier":
    per_block *= 2
    distance = jnp.square(windows - mean[:, None]).sum(-1)
    far = distance.argmax(1)[:, None, :, None]
    outlier = jnp.take_along_axis(windows, far, axis=1)[:, 0]
    rest = (mean * window - outlier) / (window - 1)
    keys = jnp.stack([rest, outlier], axis=1).reshape(-1, num_masks, dim)
    weight = jnp.tile(jnp.log(jnp.array([window - 1.0, 1.0])), len(windows))
    first_key = jnp.repeat(first_key, 2)
  else:
    keys = mean
  if settings.variance == "full":
    centred = windows - mean[:, None]
    spread = jnp.einsum("vwmd,vwme->mvde", centred, centred) / window
  rows = settings.block // settings.window_q

  def logits_of(strip):  # [rows, masks, dim] to [masks, rows, composites]
    logits = jnp.einsum("rmd,vmd->mrv", strip, keys)
    if settings.key in ("max", "mean_max"):
      bound = jnp.einsum("rmd,vmd->mrv", jnp.maximum(strip, 0), windows.max(1))
      bound += jnp.einsum("rmd,vmd->mrv", jnp.minimum(strip, 0), windows.min(1))
      logits = bound if settings.key == "max" else 0.5 * (logits + bound)
    if settings.variance == "diagonal":
      logits += 0.5 * jnp.einsum("rmd,vmd->mrv", strip**2, windows.var(1))
    elif settings.variance == "full":
      logits += 0.5 * jnp.einsum("rmd,mvde,rme->mrv", strip, spread, strip)
    return logits + weight[None, None, :]

  def one_block(operands):
    strip, index = operands
    last = index * settings.block + settings.window_q * jnp.arange(
      1, rows + 1, dtype=jnp.int32
    )
    visible = first_key[None, :] < last[:, None]
    logits = jnp.where(visible[None], logits_of(strip), -jnp.inf)
    p = jax.nn.softmax(logits, axis=-1)
    p = p.reshape(num_masks, rows, -1, per_block).sum(-1)
    if settings.reduce == "mean":
      return p.mean(1)
    p = p.max(1)
    return p / p.sum(-1, keepdims=True)

  strips = q.reshape(-1, rows, num_masks, dim)
  scores = lax.map(
    one_block, (strips, jnp.arange(len(strips), dtype=jnp.int32))
  )
  return jnp.moveaxis(scores, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refined:
  """Fine scores for the blocks that coarse scores find, coarse for the rest.

  Attributes:
    coarse: scores of all blocks.
    fine: scores of the chosen ones; a kernel would compute no others.
    mass: coarse mass up to which blocks are chosen.
  """

  coarse: Composite = Composite(window_q=32, window_kv=32)
  fine: Composite = Composite(window_q=4, window_kv=4)
  mass: float = 0.98

  def __call__(self, q, k):
    coarse, fine = self.coarse(q, k), self.fine(q, k)
    falling = -jnp.sort(-coarse, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    count = (before < self.mass).sum(-1, keepdims=True)
    cutoff = jnp.take_along_axis(falling, count - 1, axis=-1)
    chosen = coarse >= cutoff
    held = jnp.where(chosen, coarse, 0.0).sum(-1, keepdims=True)
    fine = jnp.where(chosen, fine, 0.0)
    fine *= held / jnp.maximum(fine.sum(-1, keepdims=True), 1e-30)
    return jnp.where(chosen, fine, coarse)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargestOfHeads:
  """The largest score of the heads that share a mask.

  Attributes:
    scores: of each head.
    head_group: consecutive query heads that share a mask.
  """

  scores: Composite = Composite(head_group=1)
  head_group: int = 3

  def __call__(self, q, k):
    scores = self.scores(q, k)
    scores = scores.reshape(-1, self.head_group, *scores.shape[1:]).max(1)
    return scores / scores.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Antidiagonal:
  """XAttention's scores, for comparison."""

  stride: int = 8
  block: int = 128

  def __call__(self, q, k):
    return _antidiagonal(self, q[None], k[None])[0]


@functools.partial(jax.jit, static_argnums=0)
def _antidiagonal(settings: Antidiagonal, q, k):
  blocks = dict(block_q=settings.block, block_kv=settings.block)
  pattern = attention.XAttention(stride=settings.stride, **blocks)
  grid = attention.BlockGrid.create(q, k, **blocks)
  return pattern.block_scores(q, k, grid)


def with_block(variant, block: int):
  """The variant, and those inside it, for blocks of this many tokens."""
  changes = {}
  for field in dataclasses.fields(variant):
    value = getattr(variant, field.name)
    if field.name == "block":
      changes["block"] = block
    elif dataclasses.is_dataclass(value):
      changes[field.name] = with_block(value, block)
  return dataclasses.replace(variant, **changes)


@functools.partial(jax.jit, static_argnames="block")
def true_mass(q, k, *, block):
  """Dense softmax mass of each block, by query head."""
  grid = attention.BlockGrid.create(
    q[None], k[None], block_q=block, block_kv=block
  )
  return attention.metrics.block_mass(q[None], k[None], grid)[0]


def similar_heads(scores: np.ndarray, size: int) -> tuple[tuple[int, ...], ...]:
  """Groups of heads whose scores overlap most; for few heads: tries them all.

  Args:
    scores: [num_heads, num_blocks, num_blocks], rows sum to 1.
    size: heads in a group; divides num_heads.

  Returns:
    The groups, each head in one.
  """
  pairs = itertools.combinations(range(len(scores)), 2)
  overlap = {
    (a, b): np.minimum(scores[a], scores[b]).sum(-1).mean() for a, b in pairs
  }

  def partitions(heads: list[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    if not heads:
      yield ()
      return
    for others in itertools.combinations(heads[1:], size - 1):
      rest = [head for head in heads[1:] if head not in others]
      for groups in partitions(rest):
        yield ((heads[0], *others), *groups)

  def total(groups):
    return sum(overlap[p] for g in groups for p in itertools.combinations(g, 2))

  return max(partitions(list(range(len(scores)))), key=total)


def mean_of_groups(scores: np.ndarray, groups: Iterable) -> np.ndarray:
  """Scores by head, each the mean of its group's."""
  shared = np.empty_like(scores)
  for group in groups:
    shared[list(group)] = scores[list(group)].mean(0)
  return shared


_C = Composite
VARIANTS = {
  "mean 16": _C(),
  "mean 8": _C(window_q=8, window_kv=8),
  "mean 32": _C(window_q=32, window_kv=32),
  "mean 16, one mask a head": _C(head_group=1),
  "mean 8, one mask a head": _C(window_q=8, window_kv=8, head_group=1),
  "mean 32, one mask a head": _C(window_q=32, window_kv=32, head_group=1),
  "mean 64, one mask a head": _C(window_q=64, window_kv=64, head_group=1),
  "mean 16, largest of 3 heads": LargestOfHeads(),
  "mean 16, one mask for 6 heads": _C(head_group=6),
  "queries 16, keys 1": _C(window_kv=1),
  "queries 16, keys 4": _C(window_kv=4),
  "queries 4, keys 16": _C(window_q=4),
  "queries 64, keys 16": _C(window_q=64),
  "last query of 16": _C(query="last"),
  "max of keys": _C(key="max"),
  "mean and max of keys": _C(key="mean_max"),
  "outlier key apart": _C(key="outlier"),
  "diagonal variance": _C(variance="diagonal"),
  "full variance": _C(variance="full"),
  "temperature 0.8": _C(temperature=0.8),
  "temperature 1.25": _C(temperature=1.25),
  "max over query windows": _C(reduce="max"),
  "refined 32 to 4": Refined(),
  "xattention stride 8": Antidiagonal(stride=8),
  "xattention stride 16": Antidiagonal(stride=16),
}
