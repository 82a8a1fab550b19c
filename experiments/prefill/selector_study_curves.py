# SPDX-License-Identifier: Apache-2.0
"""Density and recall of every budget at once, and tables of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.table

TOP_P = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
# Smallest score of a kept block, as a multiple of 1 / num_blocks.
THRESHOLDS = (4.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005)
FLOOR = 0.8  # of the scores of a row, whatever the threshold
RULES = {
  "top_p": TOP_P,
  "threshold": THRESHOLDS,
  "threshold_floor": THRESHOLDS,
}
FORCED_SINK = 1
_POINTS = 400  # of a curve, for interpolation


def curves(scores: np.ndarray, mass: np.ndarray) -> dict[str, Any]:
  """What each budget keeps of a causal sequence.

  The first block and the diagonal are always kept. "top_p" takes the others in
  falling order of score until a row's scores reach p. "threshold" takes those
  whose score exceeds a fixed value, the same for all rows and heads;
  "threshold_floor" adds what top_p of `FLOOR` takes.

  Args:
    scores: [num_mask_heads, num_blocks, num_blocks], rows sum to 1.
    mass: [num_heads, num_blocks, num_blocks], dense softmax, rows sum to 1.

  Returns:
    {rule: {"density": [num_heads, num_budgets], "recall": likewise,
    "recall_p1": [num_budgets], first percentile over rows of blocks}}.
  """
  num_blocks = mass.shape[-1]
  scores = np.repeat(scores, len(mass) // len(scores), axis=0)
  row, column = np.arange(num_blocks)[:, None], np.arange(num_blocks)[None, :]
  visible = column <= row
  forced = visible & ((column < FORCED_SINK) | (column == row))
  key = np.where(forced, np.inf, np.where(visible, scores, -np.inf))
  order = np.argsort(-key, axis=-1, kind="stable")
  score = np.take_along_axis(np.where(visible, scores, 0.0), order, axis=-1)
  # [num_heads, num_blocks, num_blocks + 1]: held by the first n blocks.
  held = np.cumsum(np.take_along_axis(mass * visible, order, axis=-1), axis=-1)
  held = np.pad(held, ((0, 0), (0, 0), (1, 0)))
  before = np.cumsum(score, axis=-1) - score
  num_forced, num_visible = forced.sum(-1), visible.sum(-1)
  result = {}
  for rule, budgets in RULES.items():
    counts = []
    for budget in budgets:
      if rule == "top_p":
        count = (before < budget).sum(-1)
      else:
        count = (key > budget / num_blocks).sum(-1)
      if rule == "threshold_floor":
        count = np.maximum(count, (before < FLOOR).sum(-1))
      counts.append(np.clip(count, num_forced, num_visible))
    # [num_heads, num_blocks, num_budgets]
    counts = np.stack(counts, axis=-1)
    recall = np.take_along_axis(held, counts, axis=-1)
    result[rule] = {
      "density": counts.sum(1) / num_visible.sum(),
      "recall": recall.mean(1),
      "recall_p1": np.quantile(recall, 0.01, axis=(0, 1)),
    }
  return result


def density_at(density, recall, target: float) -> float:
  """Density at which a curve reaches a recall; NaN where it does not."""
  density, recall = np.asarray(density), np.asarray(recall)
  order = np.argsort(density)
  density, recall = density[order], np.maximum.accumulate(recall[order])
  if not recall[0] <= target <= recall[-1]:
    return float("nan")
  return float(np.interp(target, recall, density))


def calibrated(calibration, test, target: float) -> dict[str, float]:
  """Density and recall on a test text of budgets for each head.

  Args:
    calibration: (density, recall), both [num_heads, num_budgets] of all layers'
      heads, on the texts that the budgets are chosen on.
    test: the same on the texts that they are judged on.
    target: mean recall aimed at.

  Returns:
    {name: (density, recall)} of "one budget for all", "equal recall": each
    head's smallest budget that reaches the target, and "equal slope": budgets
    at which one more block buys as much recall in every head.
  """
  density, recall = calibration
  heads = np.arange(len(density))
  by_density = np.argsort(density, axis=1)
  density, recall = (
    np.take_along_axis(x, by_density, axis=1) for x in (density, recall)
  )
  chosen = {}
  same = np.argmax(recall.mean(0) >= target)
  chosen["one budget for all"] = np.full(len(density), same)
  reached = recall >= target
  chosen["equal recall"] = np.where(
    reached.any(1), reached.argmax(1), recall.shape[1] - 1
  )
  best = None
  for price in np.geomspace(1e-3, 1e3, _POINTS):
    index = np.argmax(recall - price * density, axis=1)
    if recall[heads, index].mean() >= target:
      best = index  # the highest price that still reaches the target
  chosen["equal slope"] = chosen["one budget for all"] if best is None else best
  test_density, test_recall = (
    np.take_along_axis(np.asarray(x), by_density, axis=1) for x in test
  )
  return {
    name: (
      float(test_density[heads, index].mean()),
      float(test_recall[heads, index].mean()),
    )
    for name, index in chosen.items()
  }


def calibrate(found, lengths, texts, targets, names) -> list[dict]:
  """Budgets by head: chosen on all texts but one, judged on that one.

  Args:
    found: records with curves by head of the named variants.
    lengths: as of the study.
    texts: likewise.
    targets: recalls aimed at.
    names: variants.

  Returns:
    Density and recall on the text left out, mean over which one that is, for
    each way of `calibrated`.
  """
  lines = []
  for length in lengths:
    for name in names:
      for target in targets:
        judged: dict[str, list] = {}
        for held_out in texts if len(texts) > 1 else ():

          def heads(is_test, length=length, name=name, held_out=held_out):
            by_text = {}
            for r in found:
              if r["length"] == length and (r["text"] == held_out) == is_test:
                curve = r["curves"][name]["top_p"]
                by_text.setdefault(r["text"], []).append(
                  (curve["density"], curve["recall"])
                )
            stacked = [
              [np.concatenate(x) for x in zip(*layers, strict=True)]
              for layers in by_text.values()
            ]
            return np.mean(stacked, axis=0)

          chosen = calibrated(heads(False), heads(True), target)
          for how, value in chosen.items():
            judged.setdefault(how, []).append(value)
        for how, values in judged.items():
          density, recall = np.mean(values, axis=0)
          lines.append(
            {
              "length": length,
              "scores": name,
              "target": target,
              "budgets": how,
              "density": round(float(density), 4),
              "recall": round(float(recall), 4),
            }
          )
  return lines


def table(
  records: Sequence[dict[str, Any]], targets: Sequence[float]
) -> list[dict[str, Any]]:
  """One row for each length, variant and rule.

  Curves are averaged over texts, layers and heads at each budget, as one
  setting for the whole model would do; then read at the targets.
  """
  rows = []
  for length in sorted({record["length"] for record in records}):
    here = [record for record in records if record["length"] == length]
    for variant in here[0]["curves"]:
      for rule in RULES:
        curve = [record["curves"][variant][rule] for record in here]
        density, recall, p1 = (
          np.mean([c[name] for c in curve], axis=0)
          for name in ("density", "recall", "recall_p1")
        )
        row = {"length": length, "variant": variant, "rule": rule}
        for target in targets:
          needed = density_at(density, recall, target)
          at_needed = np.interp(needed, np.sort(density), np.sort(p1))
          row[f"density@{target}"] = round(needed, 4)
          row[f"p1@{target}"] = round(float(at_needed), 4)
        rows.append(row)
  return rows


def rich_table(rows, targets) -> rich.table.Table:
  """The rows, by density at the middle target."""
  shown = rich.table.Table(
    title="Density needed for a mean recall, and the 1st percentile there"
  )
  for name in ("length", "scores", "rule"):
    shown.add_column(name, no_wrap=True)
  for target in targets:
    shown.add_column(f"{target:.2f}", justify="right")
    shown.add_column("p1", justify="right")
  middle = f"density@{targets[len(targets) // 2]}"
  length = None
  for row in sorted(rows, key=lambda r: (r["length"], r[middle])):
    if length not in (None, row["length"]):
      shown.add_section()
    length = row["length"]
    cells = [f"{length:,}", row["variant"], row["rule"]]
    for target in targets:
      cells += [f"{row[f'density@{target}']:.4f}", f"{row[f'p1@{target}']:.3f}"]
    shown.add_row(*cells)
  return shown
