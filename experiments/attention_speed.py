# SPDX-License-Identifier: Apache-2.0
"""Speed of block-sparse attention beside its peers, on the same inputs.

The same values within JAX; PyTorch draws its own of the same distribution, and
takes the same block lists.

For each size and density: our kernel; once for each size: the dense peers
(cuDNN through JAX, JAX's own Mosaic GPU kernel, tokamax, PyTorch's
FlashAttention-2 and cuDNN) and, at each density, PyTorch's FlexAttention with
the same block mask. TFLOP/s count the products of the kept blocks; the causal
half of all pairs for dense peers; a selection's time is printed as a share of
the fastest dense peer's. With `captured`, also on what a model's layers saw in
a real prompt, with the masks that patterns make of it. Writes
WORKDIR/records.jsonl, a line a measurement, and WORKDIR/speed.png.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import matplotlib

matplotlib.use("agg")
import matplotlib.figure
import rich.console
import rich.table
from absl import app

from experiments.frame import flags_and_configs
from experiments.kernels import attention_speed_captured
from experiments.kernels import attention_speed_config as speed_config
from experiments.kernels import attention_speed_run as speed_run
from unisparse_jax import records

_CONFIG, _WORKDIR = flags_and_configs.define()
_NAMES = (
  *("length", "head_dim", "direction", "layer", "method", "what", "density"),
)
_ROOT = pathlib.Path(__file__).parents[1]
_FOLDERS = re.compile(r"(?<!\w)(?:/[^\s/'\"]+)+/")  # of an absolute path
_MOST_WORDS = 300  # characters
# Of the figure. Some dense peers are equally fast: lines that are seen through.
_TICKS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_DENSE_STYLES = ("-.", ":", "--", (0, (1, 4)), (0, (6, 3)))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = speed_config.parse(_CONFIG.value)
  flags_and_configs.start_jax()
  workdir = records.claim_workdir(_WORKDIR.value, records.to_json(config))
  path = workdir / "records.jsonl"
  writer = records.RecordWriter(path, config)
  console = rich.console.Console()
  if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 150  # so that no line breaks
  measured = []
  for record in _measure(config):
    measured.append(writer.write(**record))
    console.print(_line(record), highlight=False)
  rows = add_ratios(measured)
  console.print(_table(rows))
  _figure(rows).savefig(workdir / "speed.png", dpi=110)
  console.print(f"{path}\n{workdir / 'speed.png'}", highlight=False)


def _measure(config: speed_config.Config) -> Iterator[dict[str, Any]]:
  """Every record: PyTorch's first, while JAX holds no memory."""
  if any(set(c.peers) & set(speed_config.TORCH_PEERS) for c in config.cases):
    yield from _measure_torch(config)
  for case in config.cases:
    yield from speed_run.measure_case(config, case)
  if config.captured:
    yield from attention_speed_captured.measure_captured(config)


def _measure_torch(config: speed_config.Config) -> Iterator[dict[str, Any]]:
  request = json.dumps(_without_types(records.to_json(config)))
  try:
    done = subprocess.run(
      [sys.executable, "-m", "experiments.kernels.attention_speed_torch"],
      input=request,
      capture_output=True,
      text=True,
      timeout=config.torch_timeout_s,
      cwd=_ROOT,
      check=True,
    )
    output, messages, error = done.stdout, done.stderr, None
  except subprocess.TimeoutExpired as expired:  # of bytes, whatever was asked
    output, messages = (
      (x or b"").decode(errors="replace")
      for x in (expired.stdout, expired.stderr)
    )
    error = f"stopped after {config.torch_timeout_s} s"
  except subprocess.CalledProcessError as failed:
    output, messages = failed.stdout, failed.stderr
    error = f"exit status {failed.returncode}"
  sys.stderr.write(messages)
  for line in output.splitlines():
    if line.startswith("{"):
      yield json.loads(line)
  if error:
    said = _last_words(messages)
    yield {"method": "torch", "error": f"{error}: {said}" if said else error}


def _last_words(messages: str) -> str:
  """The end of what a process said, without a traceback and its folders."""
  lines = [
    line.strip()
    for line in messages.splitlines()
    if line.strip() and not line[0].isspace() and "Traceback" not in line
  ]
  return _FOLDERS.sub("", " ".join(lines[-3:]))[-_MOST_WORDS:]


def _without_types(value):
  """`records.to_json` names each dataclass; a config does not."""
  if isinstance(value, dict):
    return {k: _without_types(v) for k, v in value.items() if k != "type"}
  if isinstance(value, list):
    return [_without_types(item) for item in value]
  return value


def add_ratios(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Timed records, each with the fastest dense peer of its size beside it.

  Args:
    measured: records; those with an error or of selection alone are kept.

  Returns:
    Copies with "best_dense" (name) where that size and direction has a dense
    peer, "speed_up" (its time over this time) and "rate_ratio" (this TFLOP/s
    over its own), or, of a selection alone, "selection_share" (this time over
    the peer's).
  """
  best: dict[tuple, dict[str, Any]] = {}
  for record in measured:
    if record["method"] in speed_config.DENSE and "median_ms" in record:
      key = _size(record)
      if key not in best or record["median_ms"] < best[key]["median_ms"]:
        best[key] = record
  rows = []
  for record in measured:
    row = dict(record)
    peer = best.get(_size(record))
    if peer and "median_ms" in record:
      row["best_dense"] = peer["method"]
      share = record["median_ms"] / peer["median_ms"]
      if "selection" in (record["method"], record.get("what")):
        row["selection_share"] = share
      else:
        row["speed_up"] = 1.0 / share
      if "tflops" in record:
        row["rate_ratio"] = record["tflops"] / peer["tflops"]
    rows.append(row)
  return rows


def _size(record):
  return (
    record.get("length"),
    record.get("head_dim"),
    record.get("direction", "forward"),
    record.get("layer", -1),  # of captured arrays
  )


def _line(record):
  name = " ".join(str(record[key]) for key in _NAMES if key in record)
  if "error" in record:
    return f"{name}: {record['error']}"
  rate = f", {record['tflops']:.0f} TFLOP/s" if "tflops" in record else ""
  return f"{name}: {record['median_ms']:.3f} ms{rate}"


def _table(rows):
  table = rich.table.Table(title="Attention, one layer")
  columns = [c for c in _NAMES if any(c in row for row in rows)]
  ratios = ("times best dense", "rate ratio", "selection / best dense")
  for column in (*columns, "ms", "TFLOP/s", *ratios):
    table.add_column(column, justify="right")
  for row in rows:
    if "median_ms" not in row:
      continue
    table.add_row(
      *(_cell(row.get(column, "")) for column in columns),
      f"{row['median_ms']:.3f}",
      f"{row['tflops']:.0f}" if "tflops" in row else "",
      f"{row['speed_up']:.2f}" if "speed_up" in row else "",
      f"{row['rate_ratio']:.2f}" if "rate_ratio" in row else "",
      f"{row['selection_share']:.1%}" if "selection_share" in row else "",
    )
  return table


def _cell(value):
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(rows):
  """TFLOP/s on the kept blocks against density, a panel a size."""
  timed = [row for row in rows if "tflops" in row and "layer" not in row]
  sizes = sorted({_size(row) for row in timed})
  count = max(len(sizes), 1)
  columns = min(count, 4)
  lines = -(-count // columns)
  figure = matplotlib.figure.Figure(
    figsize=(4.2 * columns, 3.4 * lines + 0.5), layout="constrained"
  )
  axes = figure.subplots(lines, columns, squeeze=False)
  # The same in every panel: widths, ticks, and how a method is drawn.
  densities = [row["density"] for row in timed] or [1.0]
  low, high = min(densities) / 1.2, 1.2 * max(densities)
  ticks = [tick for tick in _TICKS if low <= tick <= high]
  styles = dict(zip(speed_config.DENSE, _DENSE_STYLES, strict=True))
  drawn = {}
  for axis, size in zip(axes.flat, sizes, strict=False):
    here = [row for row in timed if _size(row) == size]
    for method in dict.fromkeys(row["method"] for row in here):
      points = sorted(
        (row["density"], row["tflops"])
        for row in here
        if row["method"] == method
      )
      if method in drawn:
        colour = drawn[method].get_color()
      else:
        colour = f"C{len(drawn)}"
      if method in styles:
        line = axis.axhline(
          points[0][1], ls=styles[method], lw=1.4, color=colour
        )
      else:
        (line,) = axis.plot(
          *zip(*points, strict=True), marker="o", color=colour
        )
      drawn.setdefault(method, line)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("density of kept blocks")
    axis.set_title(f"{size[0]:,} tokens, head dim {size[1]}, {size[2]}")
    axis.set_ylim(0, 1.08 * max(row["tflops"] for row in here))
  for axis in list(axes.flat)[len(sizes) :]:
    axis.set_visible(False)
  for line in axes:
    line[0].set_ylabel("TFLOP/s on kept blocks")
  figure.legend(
    [*drawn.values()],
    [name + " (dense)" * (name in styles) for name in drawn],
    loc="outside lower center",
    ncols=2 * columns,
  )
  return figure


if __name__ == "__main__":
  flags_and_configs.run(main)
