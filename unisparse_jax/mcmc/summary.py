# SPDX-License-Identifier: Apache-2.0
"""Tables of plain and controlled means, and the way to ArviZ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unisparse_jax.mcmc import checks, estimates

COLUMNS = (
  "mean",
  "mcse_plain",
  "mcse_controlled",
  "factor",
  "ess_plain",
  "ess_controlled",
  "r_hat",
)


def summary(
  estimate: estimates.Estimate, names: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
  """Plain and controlled results of each function, side by side.

  Args:
    estimate: of `estimates.estimate` or `choose`.
    names: of the functions; default their numbers.

  Returns:
    By name, a value for each of COLUMNS: "mean" is the controlled one, "factor"
    the variance of the plain mean over that of the controlled one, and ess the
    number of exact independent draws worth as much (not capped).

  Raises:
    ValueError: the number of names is not that of functions.
  """
  names = _check_names(names, len(estimate.mean))
  columns = {
    "mean": estimate.mean,
    "mcse_plain": estimate.plain_mcse,
    "mcse_controlled": estimate.mcse,
    "factor": estimate.factor,
    "ess_plain": estimate.plain_ess,
    "ess_controlled": estimate.ess,
    "r_hat": estimate.r_hat,
  }
  return {
    name: {column: float(values[i]) for column, values in columns.items()}
    for i, name in enumerate(names)
  }


def table(
  estimate: estimates.Estimate,
  names: Sequence[str] | None = None,
  *,
  title: str | None = None,
) -> Any:
  """`summary` as a `rich.table.Table`; needs the package rich."""
  from rich import table as rich_table  # Optional: the `mcmc` extra.

  result = rich_table.Table(title=title)
  result.add_column("")
  for column in COLUMNS:
    result.add_column(column.replace("_", " "), justify="right")
  for name, row in summary(estimate, names).items():
    result.add_row(name, *(f"{row[column]:.3g}" for column in COLUMNS))
  return result


def to_datatree(
  estimate: estimates.Estimate,
  names: Sequence[str] | None = None,
  *,
  posterior: Mapping[str, Any] | None = None,
  sample_stats: Mapping[str, Any] | None = None,
) -> Any:
  """An ArviZ DataTree; needs the package arviz.

  Args:
    estimate: its summary becomes the group "controlled", along "function".
    names: of the functions.
    posterior: draws by name, [num_steps, num_chains, ...] as `Run.trace` has
      them, where they were kept.
    sample_stats: likewise, such as acceptance_rate.

  Returns:
    The tree.
  """
  import arviz_base  # Optional: the `mcmc` extra.
  import xarray

  rows = summary(estimate, names)
  controlled = xarray.Dataset(
    {
      column: ("function", np.array([row[column] for row in rows.values()]))
      for column in COLUMNS
    },
    coords={"function": list(rows)},
    attrs={
      "num_chains": estimate.num_chains,
      "num_draws": estimate.num_draws,
    },
  )
  groups = {}
  for name, values in (
    ("posterior", posterior),
    ("sample_stats", sample_stats),
  ):
    if values:
      # ArviZ puts chains before draws.
      groups[name] = {
        key: np.swapaxes(np.asarray(value), 0, 1)
        for key, value in values.items()
      }
  tree = arviz_base.from_dict(groups) if groups else xarray.DataTree()
  tree["controlled"] = xarray.DataTree(controlled)
  return tree


def _check_names(names, num_functions):
  names = [str(i) for i in range(num_functions)] if names is None else names
  checks.require(
    len(names) == num_functions and len(set(names)) == len(names),
    "names",
    "be different, one for each function",
    list(names),
    f"{num_functions} names",
  )
  return list(names)
