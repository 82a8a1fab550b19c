# SPDX-License-Identifier: Apache-2.0
"""Settings of the frontier: sweeps, which become patterns of one long run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments import flags_and_configs, long_context_config
from pallas_kernels import checks

_OWN = ("sweeps", "matched_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """One pattern at several budgets.

  Attributes:
    label: name of the line.
    method: name of the pattern.
    budget: field that is swept; "" for a pattern with one point.
    values: of that field.
    settings: the pattern's other fields, as (name, value).
    measure: see `long_context_config.PatternEntry`.
  """

  label: str
  method: str
  budget: str = ""
  values: tuple = ()
  settings: tuple = ()
  measure: tuple[str, ...] = long_context_config.MEASURES

  def __post_init__(self):
    checks.require(self.label != "", "label", "not be empty", self.label)
    checks.require(
      bool(self.budget) == bool(self.values),
      "values",
      "be given if and only if budget is",
      self.values,
    )

  @property
  def points(self) -> dict[str, Any]:
    """{label of a point: its budget}, in order."""
    if not self.budget:
      return {self.label: None}
    return {f"{self.label} {_short(value)}": value for value in self.values}

  def entries(self) -> list[dict[str, Any]]:
    """One entry of `LongContextConfig.patterns` a point."""
    common = {"method": self.method, "measure": self.measure}
    common |= dict(self.settings)
    return [
      common | {"label": label} | ({self.budget: value} if self.budget else {})
      for label, value in self.points.items()
    ]


def parse(
  config: Any,
) -> tuple[long_context_config.LongContextConfig, tuple[Sweep, ...], float]:
  """Builds the settings of the run and its sweeps.

  Args:
    config: fields of `LongContextConfig` but `patterns`; "sweeps", mappings
      with the fields of `Sweep`, other keys being settings of the pattern; and
      "matched_share", the share of the dense score that counts as matched.

  Returns:
    The run's settings, the sweeps, the share.

  Raises:
    ValueError: an unknown key or a bad value.
  """
  values = flags_and_configs.to_dict(config)
  for name in _OWN:
    if name not in values:
      raise ValueError(f"config must have {name}; got {sorted(values)}.")
  share = values.pop("matched_share")
  checks.check_fraction("config.matched_share", share)
  sweeps = tuple(
    _sweep(sweep, f"config.sweeps[{i}]")
    for i, sweep in enumerate(values.pop("sweeps"))
  )
  checks.require(len(sweeps) > 0, "config.sweeps", "not be empty", sweeps)
  values["patterns"] = tuple(e for sweep in sweeps for e in sweep.entries())
  return long_context_config.parse(values), sweeps, share


def _sweep(values: Any, name: str) -> Sweep:
  if not isinstance(values, Mapping) and not hasattr(values, "to_dict"):
    raise ValueError(f"{name} must be a mapping; got {values!r}.")
  values = flags_and_configs.to_dict(values)
  fields = {field.name for field in dataclasses.fields(Sweep)} - {"settings"}
  own = {key: values[key] for key in values.keys() & fields}
  own["settings"] = tuple(
    (key, value) for key, value in values.items() if key not in fields
  )
  return flags_and_configs.to_dataclass(Sweep, own, name=name)


def _short(value: Any) -> str:
  """A budget as text; of heads, the first one's sizes."""
  if isinstance(value, tuple):
    return " ".join(str(x) for x in value[0][1:])
  return str(value)
