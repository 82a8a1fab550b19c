# SPDX-License-Identifier: Apache-2.0
"""Figures of the sampler experiments, from their records."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt


def factors(found: list[dict], folder: pathlib.Path) -> pathlib.Path | None:
  """Factor and absolute error of the means against acceptance."""
  longest = {}
  for record in found:
    key = (record["target"], record["acceptance"])
    if key not in longest or record["length"] > longest[key]["length"]:
      longest[key] = record
  if not longest:
    return None
  shown = ("two", "score", "all", "polynomial", "chosen")
  targets = sorted({target for target, _ in longest})
  figure, axes = plt.subplots(
    2, len(targets), figsize=(3.6 * len(targets), 6), squeeze=False
  )
  for column, target in enumerate(targets):
    rows = sorted(
      (r for (name, _), r in longest.items() if name == target),
      key=lambda r: r["acceptance_rate"],
    )
    rates = [r["acceptance_rate"] for r in rows]
    for name in shown:
      parts = [r["methods"].get(name, {}).get("linear") for r in rows]
      if any(p is None for p in parts):
        continue
      for axis, field in ((0, "median"), (1, "relative_error")):
        axes[axis, column].semilogy(
          rates, [p[field] for p in parts], "o-", label=name
        )
    axes[0, column].set_title(target)
    axes[1, column].set_xlabel("acceptance rate")
    axes[1, column].axhline(1, color="grey", linewidth=0.7)
  axes[0, 0].set_ylabel("variance plain / controlled")
  axes[1, 0].set_ylabel("variance relative to exact draws")
  axes[0, 0].legend(fontsize="small")
  return _save(figure, folder / "factors.png")


def chains(trace, names, file: pathlib.Path) -> pathlib.Path:
  """Traces and autocorrelation of one coordinate for several samplers.

  Args:
    trace: one [num_steps] array for each sampler.
    names: of the samplers.
    file: that is written.
  """
  figure, axes = plt.subplots(
    len(names), 2, figsize=(9, 1.6 * len(names)), squeeze=False
  )
  for row, (name, values) in enumerate(zip(names, trace, strict=True)):
    values = np.asarray(values)
    axes[row, 0].plot(values[:500], linewidth=0.7)
    axes[row, 0].set_ylabel(name)
    axes[row, 1].plot(autocorrelation(values)[:50])
    axes[row, 1].axhline(0, color="grey", linewidth=0.7)
  axes[-1, 0].set_xlabel("step")
  axes[-1, 1].set_xlabel("lag")
  return _save(figure, file)


def calibration(found: list[dict], folder: pathlib.Path) -> pathlib.Path | None:
  """Share of intervals that hold the truth against their nominal level."""
  found = [record for record in found if "coverage" in record]
  if not found:
    return None
  figure, axes = plt.subplots(
    1, len(found), figsize=(3.6 * len(found), 3.6), squeeze=False
  )
  for axis, record in zip(axes[0], found, strict=True):
    part = record["coverage"]
    axis.plot([0.4, 1], [0.4, 1], color="grey", linewidth=0.7)
    for name in ("plain", "controlled"):
      axis.plot(part["levels"], part[name], "o-", label=name)
    axis.set_title(record["target"])
    axis.set_xlabel("nominal level")
  axes[0, 0].set_ylabel("measured coverage")
  axes[0, 0].legend()
  return _save(figure, folder / "calibration.png")


def autocorrelation(values: np.ndarray) -> np.ndarray:
  """Sample autocorrelation at every lag, by FFT."""
  centred = values - values.mean()
  size = 2 * len(values)
  power = np.abs(np.fft.rfft(centred, size)) ** 2
  result = np.fft.irfft(power, size)[: len(values)]
  return result / result[0] if result[0] > 0 else result


def _save(figure, path):
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return path
