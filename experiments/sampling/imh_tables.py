# SPDX-License-Identifier: Apache-2.0
"""Tables of the independent-Metropolis experiment."""

import rich.console
import rich.table

from experiments.sampling import imh_throughput


def show(found: list[dict]):
  """Prints a table of each kind."""
  console = rich.console.Console(width=130)
  gains = rich.table.Table(title="independent draws' error^2 over the method's")
  for column in (
    "case",
    "fit",
    "method",
    "means",
    "worst",
    "squares",
    "accept",
  ):
    gains.add_column(column, justify="left" if column != "means" else "right")
  errors = rich.table.Table(title="marginal likelihood, relative error")
  for column in ("case", "fit", "method", "rmse", "bias"):
    errors.add_column(column)
  for record in found:
    if record["kind"] == "posterior":
      gain = record["gain"]
      numbers = [gain["means"]["median"], gain["means"]["min"]]
      numbers += [gain["squares"]["median"], record.get("acceptance_rate")]
      cells = ["" if n is None else f"{n:.3g}" for n in numbers]
      gains.add_row(record["case"], record["fit"], record["method"], *cells)
    elif record["kind"] == "evidence":
      cells = [f"{record[k]:.2e}" for k in ("relative_rmse", "relative_bias")]
      errors.add_row(record["case"], record["fit"], record["method"], *cells)
    else:
      console.print({k: record[k] for k in ("method", *imh_throughput.SHOWN)})
  for table in (gains, errors):
    if table.row_count:
      console.print(table)
