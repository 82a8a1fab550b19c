# SPDX-License-Identifier: Apache-2.0
"""Attention on captured q, k, v: masks that a model makes, not random ones."""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from experiments import (
  attention_speed_config,
  attention_speed_run,
  capture_attention,
  long_context_config,
)
from unisparse_jax import attention


def measure_captured(
  config: attention_speed_config.Config,
) -> Iterator[dict[str, Any]]:
  """Records of every captured layer: dense peers, then each pattern.

  Of a pattern: "with selection" in one call, the "selection" alone, the kernel
  over the real mask, and the kernel over a random mask of the same density,
  whose rows are of equal share. A method that fails yields its error.
  """
  for length, layer in capture_attention.found_in(config.captured):
    q, k, v = capture_attention.load(config.captured, length, layer)
    size = {
      "length": length,
      "head_dim": q.shape[-1],
      "direction": "forward",
      "layer": layer,
    }
    pairs = attention_speed_run.causal_pairs(length, q.shape[2])
    for peer in config.captured_peers:
      timed = attention_speed_run.time_peer(config, peer, (q, k, v), pairs)
      yield {**size, "method": peer, "density": 1.0, **timed}
    for values in (*config.captured_patterns, *_matched(config, length)):
      entry = long_context_config.make_entry(values, config.captured_model)
      yield from _measure_pattern(config, size, entry, layer, q, k, v)


def _measure_pattern(config, size, entry, layer, q, k, v):
  pattern = entry.pattern(layer)
  size = {**size, "pattern": repr(pattern)}
  label = entry.label
  try:
    mask = jax.jit(pattern.select)(q, k)
    nominal = jax.jit(attention.metrics.nominal_density)(mask).mean()
    density = float(attention.metrics.density(mask).mean())
  except Exception as error:
    yield {
      **size,
      "method": label,
      **attention_speed_run.failure(error),
    }
    return
  found = {"density": density, "nominal_density": float(nominal)}
  sparse = attention.SparseAttention(
    pattern=pattern, implementation=config.implementation
  )
  grid = mask.grid
  per_mask = q.shape[2] // mask.num_mask_heads
  pairs = float(mask.num_kv_blocks.sum()) * per_mask
  pairs *= grid.block_q * grid.block_kv
  timed = functools.partial(attention_speed_run.time_kept, config)
  walk = functools.partial(
    attention.sparse_attention, implementation=config.implementation
  )
  for what, fn, args, kept in (
    ("with selection", sparse, (q, k, v), pairs),
    ("selection", pattern.select, (q, k), None),
    ("real mask", walk, (q, k, v, mask), pairs),
  ):
    record = timed(fn, args, kept, q.shape[-1])
    yield {**size, "method": label, "what": what, **found, **record}
  if mask.columns is None and grid.block_q == grid.block_kv:
    lists, counts = attention_speed_run.random_lists(
      q.shape[1],
      density,
      block=grid.block_q,
      num_mask_heads=mask.num_mask_heads,
      seed=config.seed,
    )
    kept = float(counts.sum()) * per_mask * grid.block_q**2
    record = timed(
      functools.partial(
        attention_speed_run.attend_lists, config, block=grid.block_q
      ),
      (q, k, v, lists, counts),
      kept,
      q.shape[-1],
    )
    yield {**size, "method": label, "what": "random mask", **found, **record}


def _matched(config, length) -> list[dict[str, Any]]:
  """Patterns at the budgets that a frontier found to keep the score."""
  if not config.matched:
    return []
  lines = json.loads(pathlib.Path(config.matched).read_text(encoding="utf-8"))
  return [
    pattern_of(line)
    for line in lines
    if line["length"] == length and "budget" in line
  ]


def pattern_of(line: dict[str, Any]) -> dict[str, Any]:
  """The pattern of a line of matched.json, as `LongContextConfig` takes it."""
  values = {"label": line["label"], "method": line["method"]}
  values |= {name: _tuples(x) for name, x in line["settings"].items()}
  if line["budget_field"]:
    values[line["budget_field"]] = _tuples(line["budget"])
  return values


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
