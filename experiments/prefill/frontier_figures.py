# SPDX-License-Identifier: Apache-2.0
"""Pictures and the table of the frontier."""

from collections.abc import Iterator, Sequence
from typing import Any

import rich.table

from experiments.prefill import figures, frontier_config, long_context_config

_QUALITY = (
  ("relative_score", "score / dense score"),
  ("recall", "recall"),
  ("kl", "KL to dense, nats"),
)
_COST = (
  ("nominal_density", "density (kept pairs of tokens / visible pairs)"),
  ("total_ms", "attention with selection, ms a layer"),
)
_COLUMNS = (
  ("relative_score", "of dense", "{:.1%}"),
  ("worst_task", "worst task", "{:.1%}"),
  ("worst_task_name", "which", "{}"),
  ("recall", "recall", "{:.4f}"),
  ("recall_p1", "p1", "{:.3f}"),
  ("cra", "worst", "{:.3f}"),
  ("density", "blocks", "{:.3f}"),
  ("nominal_density", "density", "{:.3f}"),
  ("kl", "KL", "{:.4f}"),
  ("select_share", "selection", "{:.1%}"),
  ("faster_than_dense", "attention vs dense", "{:.2f}x"),
  ("prefill_faster", "first token vs dense", "{:.2f}x"),
)


def all_figures(
  records, rows: list[dict], workdir, *, sweeps
) -> Iterator[figures.Picture]:
  """Title, sentence and PNG of the frontier at each length."""
  del records, workdir
  for length in sorted({row["length"] for row in rows}):
    here = {row["pattern"]: row for row in rows if row["length"] == length}
    costs = [c for c in _COST if any(c[0] in row for row in here.values())]
    qualities = [
      q for q in _QUALITY if any(q[0] in row for row in here.values())
    ]
    if costs and qualities:
      yield (
        f"Quality against cost, {length:,} tokens",
        "A line is a pattern, a point one of its budgets. Left: against the "
        "share of token pairs that is kept. Right: against the measured time "
        "of one layer's attention, selection included; the dotted line is "
        "dense attention. Up (for KL, down) and to the left is better.",
        frontier(here, sweeps, qualities, costs),
      )


def matched(
  rows: Sequence[dict], sweeps: Sequence[frontier_config.Sweep], share: float
) -> list[dict[str, Any]]:
  """Each sweep's fastest point that keeps a share of the dense task score.

  Where attention was not timed, the sparsest. A sweep of which no point keeps
  that share has a row without a budget: that of the point with the best score,
  whose budget is its "closest".
  """
  result = []
  for length in sorted({row["length"] for row in rows}):
    here = {row["pattern"]: row for row in rows if row["length"] == length}
    for sweep in sweeps:
      line: dict[str, Any] = {"length": length, "pattern": sweep.label}
      line |= {"method": sweep.method, "settings": dict(sweep.settings)}
      line["budget_field"] = sweep.budget
      scored = [
        (here[label], budget)
        for label, budget in sweep.points.items()
        if "relative_score" in here.get(label, {})
      ]
      kept = [p for p in scored if p[0]["relative_score"] >= share]
      # A search times one of them alone.
      timed = [p for p in kept if "total_ms" in p[0]]
      best, name = None, "budget"
      if timed or kept:
        cost = "total_ms" if timed else "nominal_density"
        best = min(timed or kept, key=lambda p: p[0].get(cost, float("inf")))
      elif scored:
        top = max(p[0]["relative_score"] for p in scored)
        level = [p for p in scored if p[0]["relative_score"] == top]
        best = next((p for p in level if "total_ms" in p[0]), level[0])
        name = "closest"
      if best is not None:
        found, budget = best
        line |= {key: found[key] for key, *_ in _COLUMNS if key in found}
        line[name] = budget if sweep.budget else "-"
        line["label"] = found["pattern"]
        if found.get("total_ms"):
          line["select_share"] = found["select_ms"] / found["total_ms"]
      result.append(line)
  return result


def matched_table(lines: Sequence[dict], share: float) -> rich.table.Table:
  """`matched` as a table."""
  table = rich.table.Table(
    title=f"Fastest budget that keeps {share:.0%} of the dense score"
  )
  table.add_column("tokens", justify="right")
  table.add_column("pattern", no_wrap=True)
  used = [c for c in _COLUMNS if any(c[0] in line for line in lines)]
  for heading in ("budget", *(c[1] for c in used)):
    table.add_column(heading, justify="right")
  length = None
  for line in lines:
    if length not in (None, line["length"]):
      table.add_section()
    length = line["length"]
    table.add_row(
      f"{length:,}",
      line["pattern"],
      _budget(line),
      *(
        form.format(line[name]) if name in line else "-"
        for name, _, form in used
      ),
    )
  return table


def _budget(line: dict) -> str:
  if "closest" in line:
    return f"none ({frontier_config.short(line['closest'])})"
  return frontier_config.short(line.get("budget", "none"))


def frontier(here, sweeps, qualities, costs) -> bytes:
  """Qualities against costs, a line a sweep.

  Args:
    here: {label of a point: its row}, dense among them.
    sweeps: the lines.
    qualities: (name of a value, label of its axis), a row of pictures each.
    costs: the same, a column each.

  Returns:
    A PNG.
  """
  figure = figures.new_figure(5.2 * len(costs), 3.4 * len(qualities))
  grid = figure.subplots(len(qualities), len(costs), squeeze=False)
  style = figures.styles([{"pattern": s.label} for s in sweeps], first=2)
  dense = here.get(long_context_config.DENSE, {})
  for row, (quality, quality_label) in enumerate(qualities):
    for column, (cost, cost_label) in enumerate(costs):
      axes = grid[row, column]
      for sweep in sweeps:
        points = [here[label] for label in sweep.points if label in here]
        points = [p for p in points if quality in p and cost in p]
        points.sort(key=lambda p: p[cost])
        if points:
          axes.plot(
            [p[cost] for p in points],
            [max(p[quality], 1e-6) for p in points],
            label=sweep.label,
            linewidth=1.0,
            markersize=5,
            **style[sweep.label],
          )
      if cost in dense:
        axes.axvline(dense[cost], color="#1b1f24", linewidth=0.8, linestyle=":")
      if quality == "kl":
        axes.set_yscale("log")
      elif quality.startswith("relative"):
        axes.axhline(1.0, color="#1b1f24", linewidth=0.8, linestyle=":")
      axes.set(xlabel=cost_label, ylabel=quality_label)
      axes.set_xlim(left=0.0)
      figures.tidy(axes)
  # Not every pattern is in every picture.
  shown = {}
  for axes in grid.flat:
    lines, labels = axes.get_legend_handles_labels()
    shown |= dict(zip(labels, lines, strict=True))
  labels = [sweep.label for sweep in sweeps if sweep.label in shown]
  grid[0, -1].legend(
    [shown[label] for label in labels],
    labels,
    frameon=False,
    fontsize=8,
    loc="upper left",
    bbox_to_anchor=(1.02, 1.0),
  )
  return figures.png(figure)
