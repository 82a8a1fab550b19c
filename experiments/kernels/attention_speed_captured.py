# SPDX-License-Identifier: Apache-2.0
"""Attention on captured q, k, v: masks that a model makes, not random ones."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import capture_attention
from experiments.kernels import attention_speed_config, attention_speed_run
from experiments.prefill import long_context_config, long_context_programs
from unisparse_jax import attention, models

_DENSE = long_context_config.DENSE


def measure_captured(
  config: attention_speed_config.Config,
) -> Iterator[dict[str, Any]]:
  """Records of every captured layer: the dense peer, then each pattern.

  Of a pattern: both steps "with selection", the "selection" alone, the kernel
  over the "real mask", and over a "random mask" that keeps as many blocks in
  each row. A method that fails yields its error. The programs are those of
  `experiments.frontier`: a cache that it filled serves them.
  """
  found = capture_attention.found_in(config.captured)
  for length in sorted({length for length, _ in found}):
    layers = [layer for n, layer in found if n == length]
    patterns = (*config.captured_patterns, *_matched(config, length))
    run = _run_config(config, length, patterns)
    folder = long_context_config.model_folder(run.model)
    programs = long_context_programs.Programs(
      run, models.load_hf_config(folder), ()
    )
    for layer in layers:
      arrays = capture_attention.load(config.captured, length, layer)
      for label in (_DENSE, *(entry.label for entry in run.entries)):
        yield from _measure(config, run, programs, label, layer, arrays)


def _run_config(config, length, patterns):
  if not patterns:  # nothing was matched at this length
    patterns = (dict(label="all blocks", method="dense"),)
  measure = ("layers", "attention_time")
  return long_context_config.parse(
    dict(
      model=config.captured_model,
      patterns=tuple({**values, "measure": measure} for values in patterns),
      lengths=(length,),
      dtype=config.dtype,
      implementation=config.implementation,
      dense_implementation=config.captured_dense,
      reference_measure=(),
      scan_layers=True,
    )
  )


def _measure(config, run, programs, label, layer, arrays):
  """Records of one method on one layer."""
  q, k, v = arrays
  length = q.shape[1]
  size = {"length": length, "head_dim": q.shape[-1], "layer": layer}
  size |= {"direction": "forward", "method": label}
  try:
    budget = programs.budgeted(label)[1].layer(layer).budget
    attend = programs.attend(label, layer, length)
    if label == _DENSE:
      size |= {"method": config.captured_dense, "density": 1.0}
      pairs = attention_speed_run.causal_pairs(length, q.shape[2])
      yield size | _timed(config, attend, (q, k, v, budget), q, pairs)
      return
    size["pattern"] = repr(run.entry(label).pattern(layer))
    select = programs.select(label, layer, length)
    mask = select(q, k, budget)
    nominal = jax.jit(attention.metrics.nominal_density)(mask).mean()
    density = attention.metrics.density(mask).mean()
    size |= {"density": float(density), "nominal_density": float(nominal)}
    pairs = float(mask.num_kv_blocks.sum()) * q.shape[2] / mask.num_mask_heads
    pairs *= mask.grid.block_q * mask.grid.block_kv
    calls = [
      ("with selection", attend, (q, k, v, budget), pairs),
      ("selection", select, (q, k, budget), None),
    ]
    if mask.columns is None:
      walk = programs.walk(mask, length)
      calls += [
        ("real mask", walk, (q, k, v, mask), pairs),
        ("random mask", walk, (q, k, v, shuffled(mask, config.seed)), pairs),
      ]
    for what, program, args, kept in calls:
      yield {**size, "what": what, **_timed(config, program, args, q, kept)}
  except Exception as error:  # a refusal is a result
    yield size | attention_speed_run.failure(error)


def _timed(config, program, args, q, pairs):
  record: dict[str, Any] = attention_speed_run.clock(
    lambda: program(*args),
    jax.block_until_ready,
    repeats=config.repeats,
    group_ms=config.group_ms,
  )
  if pairs is not None:
    work = attention_speed_run.flops(pairs, q.shape[-1], backward=False)
    record["tflops"] = work / float(record["median_ms"]) / 1e9
  return record


def shuffled(mask: attention.BlockMask, seed: int) -> attention.BlockMask:
  """As many blocks in every row, but others: the diagonal, the rest at random.

  Args:
    mask: causal, with equal numbers of queries and keys.
    seed: of the choice.
  """
  rng = np.random.default_rng(seed)
  grid = mask.grid
  counts = np.asarray(mask.num_kv_blocks)
  lists = np.zeros(mask.kv_block_indices.shape, np.int32)
  reach = np.asarray(grid.admissible().sum(-1))  # [batch, num_q_blocks]
  own = np.asarray(grid.diagonal().sum(-1))
  for batch, head, row in np.ndindex(*counts.shape):
    last, count = reach[batch, row], counts[batch, head, row]
    diagonal = min(own[batch, row], count)
    others = rng.permutation(last - diagonal)[: count - diagonal]
    chosen = np.concatenate([np.arange(last - diagonal, last), others])
    lists[batch, head, row, :count] = np.sort(chosen)[::-1]
  return dataclasses.replace(mask, kv_block_indices=jnp.asarray(lists))


def _matched(config, length) -> tuple[dict[str, Any], ...]:
  """Patterns at the budgets that a frontier found to keep the score."""
  if not config.matched:
    return ()
  lines = json.loads(pathlib.Path(config.matched).read_text(encoding="utf-8"))
  return tuple(
    pattern_of(line)
    for line in lines
    if line["length"] == length and "budget" in line
  )


def pattern_of(line: dict[str, Any]) -> dict[str, Any]:
  """The pattern of a line of matched.json, as `LongContextConfig` takes it."""
  values = {"label": line["label"], "method": line["method"]}
  values |= {name: _tuples(x) for name, x in line["settings"].items()}
  if line["budget_field"]:
    values[line["budget_field"]] = _tuples(line["budget"])
  return values


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
