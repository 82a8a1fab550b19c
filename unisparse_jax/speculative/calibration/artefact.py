# SPDX-License-Identifier: Apache-2.0
"""A calibrated policy as a JSON file that knows its drafter."""

import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels import checks
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative.calibration import costs as costs_lib
from unisparse_jax.speculative.calibration import partition

FORMAT = "unisparse_jax.heterospec.1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Depth and nodes of each bin, for batches of up to `batch` rows.

  Attributes:
    name: how it was chosen, such as "rule" or "search".
    batch: rows that it was chosen for.
    depth: levels of each bin.
    nodes: draft nodes of each bin, root not counted.
    drafts: False where plain decoding was the faster.
  """

  name: str
  batch: int
  depth: tuple[int, ...]
  nodes: tuple[int, ...]
  drafts: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artefact:
  """What a calibration found.

  Attributes:
    drafter_hash: `drafters.base.fingerprint` of the drafter.
    thresholds: 7 rising entropies, natural log; +inf for bins that are not.
    base_depth: levels at which the entropy is read.
    width: K of the tree and of the entropy.
    path_choice: see `policy.Policy`.
    tables: of every way to choose, and batch size.
    costs: measured times, by batch size.
    about: prompts, steps, device; anything JSON.
  """

  drafter_hash: str
  thresholds: tuple[float, ...]
  base_depth: int
  width: int
  path_choice: str
  tables: tuple[Table, ...]
  costs: tuple[costs_lib.StepCosts, ...] = ()
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def table(self, name: str, batch: int) -> Table:
    """The table of this name for the smallest batch size >= batch.

    Raises:
      ValueError: no table has the name.
    """
    found = sorted(
      (t for t in self.tables if t.name == name), key=lambda t: t.batch
    )
    if not found:
      names = sorted({t.name for t in self.tables})
      raise ValueError(
        f"name must be a table of the artefact; got name={name!r}; expected "
        f"one of {names}, or another artefact."
      )
    return next((t for t in found if t.batch >= batch), found[-1])

  def policy(
    self, name: str, *, batch: int, drafter_hash: str
  ) -> policy_lib.HeteroSpec:
    """The policy of a table.

    Args:
      name: of the table.
      batch: rows that are decoded together.
      drafter_hash: of the drafter that it shall steer.

    Raises:
      ValueError: it was fitted for another drafter.
    """
    self.check_drafter(drafter_hash)
    table = self.table(name, batch)
    # Where drafting does not pay, nothing is drafted.
    nodes = table.nodes if table.drafts else (0,) * len(table.nodes)
    return policy_lib.HeteroSpec.create(
      thresholds=self.thresholds,
      depth=table.depth,
      nodes=nodes,
      base_depth=self.base_depth,
      width=self.width,
      path_choice=self.path_choice,
      drafter_hash=self.drafter_hash,
      declines=not any(nodes),
    )

  def check_drafter(self, drafter_hash: str):
    """Raises ValueError for another drafter than the one fitted for."""
    checks.require(
      drafter_hash == self.drafter_hash,
      "artefact",
      "be fitted for this drafter",
      self.drafter_hash,
      f"drafter_hash={drafter_hash}. Calibrate again",
    )

  def cost(self, batch: int) -> costs_lib.StepCosts:
    """Times of the smallest measured batch size >= batch."""
    found = sorted(self.costs, key=lambda c: c.batch)
    if not found:
      raise ValueError("costs must have been measured; got none.")
    return next((c for c in found if c.batch >= batch), found[-1])


def save(artefact: Artefact, path: pathlib.Path | str):
  """Writes beside `path`, then renames."""
  path = pathlib.Path(path)
  values = dataclasses.asdict(artefact)
  # JSON has no infinity.
  values["thresholds"] = [
    float(t) if math.isfinite(t) else None for t in artefact.thresholds
  ]
  text = json.dumps({"format": FORMAT, **values}, indent=1, default=_plain)
  with tempfile.NamedTemporaryFile(
    "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
  ) as file:
    file.write(text + "\n")
  os.chmod(file.name, 0o644)
  os.replace(file.name, path)


def load(path: pathlib.Path | str) -> Artefact:
  """Reads and checks what `save` wrote.

  Raises:
    ValueError: not such a file, or its thresholds do not rise.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"path must name a calibration; got path={path}.")
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(
      f"path must hold JSON; got path={path}: {error}."
    ) from error
  found = values.pop("format", None) if isinstance(values, dict) else None
  checks.require(
    found == FORMAT, "format", "be one that this version reads", found, FORMAT
  )
  thresholds = tuple(
    math.inf if t is None else float(t) for t in values["thresholds"]
  )
  tables = tuple(
    Table(**{**t, "depth": tuple(t["depth"]), "nodes": tuple(t["nodes"])})
    for t in values["tables"]
  )
  artefact = Artefact(
    **{
      **values,
      "thresholds": thresholds,
      "tables": tables,
      "costs": tuple(costs_lib.from_mapping(c) for c in values["costs"]),
    }
  )
  for name in sorted({t.name for t in tables}):
    # Also checks the thresholds and the sizes.
    artefact.policy(name, batch=1, drafter_hash=artefact.drafter_hash)
  return artefact


def rule_table(
  thresholds: Sequence[float],
  *,
  base_depth: int,
  base_nodes: int,
  width: int,
  max_depth: int,
  max_nodes: int,
  alpha: int | None = None,
  first_bin: int = 0,
) -> Table:
  """The paper's rule with alpha and gamma, cut to what the tree shape holds.

  Args:
    thresholds: of the artefact.
    base_depth: levels.
    base_nodes: draft nodes, root not counted.
    width: K.
    max_depth: deepest level of the tree shape.
    max_nodes: most draft nodes.
    alpha: see `policy.HeteroSpec.from_rule`.
    first_bin: see there.
  """
  ruled = policy_lib.HeteroSpec.from_rule(
    thresholds=thresholds,
    base_depth=base_depth,
    base_nodes=base_nodes,
    width=width,
    alpha=alpha,
    first_bin=first_bin,
  )
  depth = np.minimum(np.asarray(ruled.depth), max_depth)
  nodes = np.minimum(np.asarray(ruled.nodes), max_nodes)
  assert len(depth) == partition.NUM_BINS, "the rule fills every bin"
  return Table(
    name="rule",
    batch=1,
    depth=tuple(int(d) for d in depth),
    nodes=tuple(int(n) for n in nodes),
  )


def _plain(value: Any):
  return np.asarray(value).tolist()
