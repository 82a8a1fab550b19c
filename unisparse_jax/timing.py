# SPDX-License-Identifier: Apache-2.0
"""Wall-clock and memory of a compiled function, compilation apart."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

_MOST_QUEUED = 20  # calls; each holds its results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """Result of `measure`.

  Attributes:
    compile_s: trace, lowering and compilation, seconds.
    median_ms: of the repeats.
    min_ms: fastest repeat.
    spread: (90th percentile - 10th percentile) / median, dimensionless.
    repeats: timed calls.
    peak_bytes: arguments, results and temporaries of the compiled program as
      the compiler counts them; None where it does not say.
  """

  compile_s: float
  median_ms: float
  min_ms: float
  spread: float
  repeats: int
  peak_bytes: int | None


def measure(
  fn: Callable,
  *args: Any,
  repeats: int = 10,
  warmup: int = 2,
  rotate: Sequence[tuple] = (),
) -> Timing:
  """Times `fn(*args)` after compiling it once for these shapes.

  Args:
    fn: a function of arrays, already jitted or not.
    *args: pytrees of arrays; put on the device before the clock starts.
    repeats: timed calls.
    warmup: calls before them.
    rotate: further argument tuples of the same shapes; calls take turns among
      `args` and these, so that no call finds its inputs in a cache.

  Returns:
    The timing. Each call ends with every result ready.

  Raises:
    ValueError: repeats < 1, warmup < 0, or `rotate` has other shapes.
  """
  if repeats < 1:
    raise ValueError(f"repeats must be >= 1; got repeats={repeats}.")
  if warmup < 0:
    raise ValueError(f"warmup must be >= 0; got warmup={warmup}.")
  inputs = [jax.device_put(values) for values in (args, *map(tuple, rotate))]
  shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), i) for i in inputs]
  if any(shape != shapes[0] for shape in shapes):
    raise ValueError(
      "rotate must hold tuples with the shapes and dtypes of args; got "
      f"{shapes[1:]}; expected {shapes[0]}."
    )
  jax.block_until_ready(inputs)
  start = time.perf_counter()
  jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
  compiled = jitted.lower(*inputs[0]).compile()
  compile_s = time.perf_counter() - start

  durations = []
  for call in range(warmup + repeats):
    values = inputs[call % len(inputs)]
    start = time.perf_counter()
    jax.block_until_ready(compiled(*values))
    if call >= warmup:
      durations.append(1e3 * (time.perf_counter() - start))
  return _timing(compiled, durations, compile_s)


def measure_compiled(
  compiled: Any,
  *args: Any,
  repeats: int = 5,
  group_ms: float = 0.0,
) -> Timing:
  """Times a program that is compiled already, on arrays that are in place.

  Args:
    compiled: result of `jax.jit(f).lower(...).compile()`.
    *args: its arguments.
    repeats: timed groups of calls; one call more, untimed, comes first.
    group_ms: least length of a group, by an estimate from a first timed call.
      Calls of a group are queued back to back, which hides the host's share of
      short ones; 0 times single calls. Never more than 20 calls.

  Returns:
    The timing of a call; compile_s is 0.

  Raises:
    ValueError: repeats < 1.
  """
  if repeats < 1:
    raise ValueError(f"repeats must be >= 1; got repeats={repeats}.")
  jax.block_until_ready(compiled(*args))
  start = time.perf_counter()
  jax.block_until_ready(compiled(*args))
  first_ms = 1e3 * (time.perf_counter() - start)
  calls = int(np.clip(group_ms / max(first_ms, 1e-3), 1, _MOST_QUEUED))
  durations = []
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(calls):
      result = compiled(*args)
    jax.block_until_ready(result)
    durations.append(1e3 * (time.perf_counter() - start) / calls)
  return _timing(compiled, durations, 0.0)


def _timing(compiled, durations, compile_s) -> Timing:
  low, median, high = np.percentile(durations, [10, 50, 90])
  return Timing(
    compile_s=compile_s,
    median_ms=float(median),
    min_ms=float(min(durations)),
    spread=float((high - low) / median) if median else 0.0,
    repeats=len(durations),
    peak_bytes=compiled_peak_bytes(compiled),
  )


def compiled_peak_bytes(compiled: Any) -> int | None:
  """Bytes that a compiled program holds at once, as the compiler counts them.

  Args:
    compiled: result of `jax.jit(f).lower(...).compile()`.
  """
  try:
    analysis = compiled.memory_analysis()
  except (NotImplementedError, jax.errors.JaxRuntimeError):
    return None
  if analysis is None:
    return None
  return int(
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
    + analysis.temp_size_in_bytes
  )


def device_peak_bytes(device: Any = None) -> int | None:
  """Most bytes this process ever held on the device; None if it has no count.

  Args:
    device: default the first one.
  """
  stats = (device or jax.devices()[0]).memory_stats()
  return int(stats["peak_bytes_in_use"]) if stats else None
