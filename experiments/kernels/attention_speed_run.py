# SPDX-License-Identifier: Apache-2.0
"""Inputs, clocks and JAX methods of the attention-speed experiment."""

import dataclasses
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from experiments.kernels import attention_speed_config as speed_config
from experiments.kernels import attention_speed_peers as peers
from pallas_kernels.block_sparse_attention import columns as columns_op
from unisparse_jax import attention

_DRAWN_AT_ONCE = 1 << 17  # tokens


def random_lists(
  length: int, density: float, *, block: int, num_mask_heads: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Causal block lists: the diagonal block and others at random.

  Args:
    length: tokens.
    density: share of the causal blocks that a row keeps, at least the diagonal.
    block: tokens of a block.
    num_mask_heads: number of independent masks.
    seed: of the choice.

  Returns:
    int32 [1, num_mask_heads, blocks, max_blocks], descending, and int32
    [1, num_mask_heads, blocks].
  """
  rng = np.random.default_rng(seed)
  blocks = length // block
  counts = np.maximum(1, np.round(density * np.arange(1, blocks + 1)))
  counts = counts.astype(np.int32)
  lists = np.zeros((1, num_mask_heads, blocks, counts.max()), np.int32)
  for head in range(num_mask_heads):
    for row, count in enumerate(counts):
      others = rng.permutation(row)[: count - 1]
      chosen = np.sort(np.append(others, row))[::-1]
      lists[0, head, row, :count] = chosen
  counts = np.broadcast_to(counts, (1, num_mask_heads, blocks))
  return lists, np.ascontiguousarray(counts)


def flops(kept_pairs: float, head_dim: int, *, backward: bool) -> float:
  """Floating-point operations of two (forward) or five (backward) products."""
  return (10 if backward else 4) * kept_pairs * head_dim


def causal_pairs(length: int, num_heads: int) -> float:
  """Query-key pairs of dense causal attention, half of all by convention."""
  return num_heads * length * length / 2


def clock(
  fn: Callable[[], Any],
  wait: Callable[[Any], Any],
  *,
  repeats: int,
  group_ms: float,
) -> dict[str, float]:
  """Milliseconds a call: groups of calls queued back to back, then a wait.

  Queueing hides the host's share, which the first call of a group pays alone.
  """
  wait(fn())
  start = time.perf_counter()
  wait(fn())
  first_ms = 1e3 * (time.perf_counter() - start)
  calls = max(1, round(group_ms / max(first_ms, 1e-3)))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(calls):
      result = fn()
    wait(result)
    times.append(1e3 * (time.perf_counter() - start) / calls)
  return {
    "median_ms": statistics.median(times),
    "min_ms": min(times),
    "max_ms": max(times),
    "calls": calls * repeats,
  }


def make_inputs(config: speed_config.Config, case: speed_config.Case):
  """q, k, v and a cotangent of the output (None: unused), standard normal."""
  keys = jax.random.split(jax.random.key(config.seed), 4)

  def draw(key, heads):
    if case.length > _DRAWN_AT_ONCE:  # less memory than all at once
      parts = jax.random.split(key, math.ceil(case.length / _DRAWN_AT_ONCE))
      drawn = [draw_part(part, _DRAWN_AT_ONCE, heads) for part in parts]
      return jnp.concatenate(drawn, axis=1)[:, : case.length]
    return draw_part(key, case.length, heads)

  def draw_part(key, length, heads):
    shape = (1, length, heads, case.head_dim)
    return jax.random.normal(key, shape, jnp.dtype(config.dtype))

  q = draw(keys[0], config.num_heads)
  k, v = (draw(key, config.num_kv_heads) for key in keys[1:3])
  return q, k, v, draw(keys[3], config.num_heads) if case.backward else None


def measure_case(
  config: speed_config.Config, case: speed_config.Case
) -> Iterator[dict[str, Any]]:
  """Records of ours, of the JAX peers and of the selectors for one size.

  A method that fails yields a record with its error in place of a time.
  """
  q, k, v, d_out = make_inputs(config, case)
  size = {"length": case.length, "head_dim": case.head_dim}
  directions = ("forward", "backward") if case.backward else ("forward",)
  for density in case.densities:
    lists, counts = random_lists(
      case.length,
      density,
      block=config.block,
      num_mask_heads=config.num_mask_heads,
      seed=config.seed,
    )
    per_mask = config.num_heads // config.num_mask_heads
    pairs = float(counts.sum()) * per_mask * config.block**2
    masks = (jnp.asarray(lists), jnp.asarray(counts))
    for direction in directions:
      yield {
        **size,
        "method": "ours",
        "density": density,
        "direction": direction,
        **_time(
          config,
          functools.partial(_ours, config),
          (q, k, v, d_out),
          direction,
          pairs,
          masks,
        ),
      }
  pairs = causal_pairs(case.length, config.num_heads)
  for peer in case.peers:
    if peer not in speed_config.JAX_PEERS:
      continue
    arrays = (q, k, v, d_out)
    if peer == "attention_mgpu":  # its scratch is float16
      arrays = jax.tree.map(lambda x: x.astype(jnp.float16), arrays)
    for direction in directions:
      if peer == "attention_mgpu" and direction == "backward":
        continue  # it has none under a causal mask
      yield {
        **size,
        "method": peer,
        "density": 1.0,
        "direction": direction,
        **_time(config, peers.PEERS[peer], arrays, direction, pairs),
      }
  if case.selection:
    for settings in config.selectors:
      yield {**size, **_time_selection(config, _make(settings), q, k)}
  for density in case.selected_densities:
    yield from _measure_attended(config, size, density, q, k, v)
  if case.columns:
    yield from _measure_columns(config, case, size, directions, q, v, d_out)


def _make(settings):
  settings = dict(settings)
  return attention.make_pattern(settings.pop("method"), **settings)


def _time_selection(config, pattern, q, k):
  return {
    "method": "selection",
    "selector": repr(pattern),
    **_time_call(config, pattern.select, (q, k)),
  }


def _measure_attended(config, size, density, q, k, v):
  """Selection and attention in one call, and the selection alone."""
  method = config.attended["method"]
  try:
    pattern, found = at_density(_make(config.attended), q, k, density)
  except Exception as error:
    yield {**size, "method": method, "density": density, **failure(error)}
    return
  sparse = attention.SparseAttention(
    pattern=pattern, implementation=config.implementation
  )
  record = _time_call(config, sparse, (q, k, v))
  if "error" not in record:
    pairs = 2 * found * causal_pairs(q.shape[1], q.shape[2])
    blocks = q.shape[1] // pattern.block_q
    pairs *= (blocks + 1) / (2 * blocks)  # of blocks, not of tokens
    work = flops(pairs, q.shape[-1], backward=False)
    record["tflops"] = work / float(record["median_ms"]) / 1e9
  named = {"aimed_density": density, "density": found}
  yield {**size, "method": method, "direction": "forward", **named, **record}
  yield {**size, **named, **_time_selection(config, pattern, q, k)}


def at_density(pattern: Any, q, k, density: float) -> tuple[Any, float]:
  """The pattern with the largest top_p that keeps no more than a density.

  Args:
    pattern: with a `top_p` and `block_scores`.
    q: [1, len, num_heads, head_dim].
    k: [1, len, num_kv_heads, head_dim].
    density: share of the causal blocks.

  Returns:
    The pattern, and its density on these arrays.
  """

  @jax.jit
  def score(q, k):
    grid = attention.BlockGrid.create(
      q, k, block_q=pattern.block_q, block_kv=pattern.block_kv
    )
    return pattern.block_scores(q, k, grid)

  @jax.jit
  def keep(scores, top_p):
    _, _, num_selected = pallas_kernels.block_selection(
      scores,
      q_len=q.shape[1],
      kv_len=k.shape[1],
      block_q=pattern.block_q,
      block_kv=pattern.block_kv,
      top_p=jnp.full((scores.shape[1],), top_p),
      num_sink_blocks=pattern.num_sink_blocks,
      num_local_blocks=pattern.num_local_blocks,
      max_blocks=1,  # counts alone are wanted
    )
    return num_selected.astype(jnp.float32).sum()

  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scores = score(q, k)
    num_blocks = scores.shape[1] * scores.shape[2] * (scores.shape[2] + 1) / 2
    low, high, found = 0.0, 1.0, 0.0
    for _ in range(14):
      middle = (low + high) / 2
      share = float(keep(scores, jnp.float32(middle))) / num_blocks
      if share <= density:
        low, found = middle, share
      else:
        high = middle
  if not low:
    raise ValueError(
      f"density must be reachable; got density={density}; the forced blocks "
      "alone are more."
    )
  return dataclasses.replace(pattern, top_p=low), found


def _measure_columns(config, case, size, directions, q, v, d_out):
  """Attention over single keys that a mask head's query heads share."""
  rng = np.random.default_rng(config.seed)
  units, count = config.num_mask_heads, case.columns
  positions = np.stack(
    [np.sort(rng.permutation(case.length)[:count]) for _ in range(units)]
  )
  pairs = float((case.length - positions).sum()) * config.num_heads / units
  blocks = case.length // config.block
  by_block = jnp.broadcast_to(
    jnp.asarray(positions, jnp.int32)[None, :, None],
    (1, units, blocks, count),
  )
  gathered = jnp.repeat(v[:, :count], units // v.shape[2], axis=2)

  def attend(q, k, v):
    return columns_op.column_attention(
      q,
      k,
      v,
      by_block,
      block_q=config.block,
      implementation=config.implementation,
    )[0]

  arrays = (q, gathered, gathered[:, ::-1], d_out)
  for direction in directions:
    yield {
      **size,
      "method": "columns",
      "columns": count,
      "density": count / case.length,
      "direction": direction,
      **_time(config, attend, arrays, direction, pairs),
    }


def _time(config, fn, arrays, direction, pairs, masks=()):
  """Record of one method; the operations are those of the kept pairs."""
  q, k, v, d_out = arrays
  try:
    if direction == "backward":
      _, gradient = jax.vjp(lambda q, k, v: fn(q, k, v, *masks), q, k, v)
      record = _time_call(config, lambda g, d: g(d), (gradient, d_out))
    else:
      record = _time_call(config, fn, (q, k, v, *masks))
  except Exception as error:  # a peer's refusal is a result
    return failure(error)
  if "error" not in record:
    work = flops(pairs, q.shape[-1], backward=direction == "backward")
    record["tflops"] = work / float(record["median_ms"]) / 1e9
  return record


def _time_call(config, fn, args):
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)
      compiled = jax.jit(fn).lower(*args).compile()
    record: dict[str, Any] = clock(
      lambda: compiled(*args),
      jax.block_until_ready,
      repeats=config.repeats,
      group_ms=config.group_ms,
    )
    memory = compiled.memory_analysis()
    if memory is not None:
      record["temporary_bytes"] = int(memory.temp_size_in_bytes)
    return record
  except Exception as error:
    return failure(error)


def failure(error: BaseException) -> dict[str, str]:
  """What a record has in place of a time."""
  return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def _ours(config, q, k, v, lists, counts):
  return pallas_kernels.block_sparse_attention(
    q,
    k,
    v,
    lists,
    counts,
    block_q=config.block,
    block_kv=config.block,
    implementation=config.implementation,
  )[0]
