# SPDX-License-Identifier: Apache-2.0
"""Settings of the frontier: sweeps, which become patterns of one long run."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.frame import flags_and_configs
from experiments.prefill import long_context_config
from pallas_kernels import checks
from unisparse_jax import records

_LOG = logging.getLogger(__name__)
_OWN = ("sweeps", "matched_share")
_SWITCHES = ("search", "compile_only")
# Kinds that no clock decides, and what a complete record of them has.
_BORROWED = {"answers": "score", "layers": "nominal_density"}


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
    optional: leave it out where its calibration's file is missing.
  """

  label: str
  method: str
  budget: str = ""
  values: tuple = ()
  settings: tuple = ()
  measure: tuple[str, ...] = long_context_config.MEASURES
  optional: bool = False

  def __post_init__(self):
    checks.require(self.label != "", "label", "not be empty", self.label)
    checks.require(
      bool(self.budget) == bool(self.values),
      "values",
      "be given if and only if budget is",
      self.values,
    )

  @property
  def is_missing(self) -> bool:
    """Whether it asks for a calibration that is not there."""
    file = dict(self.settings).get("file")
    return file is not None and not pathlib.Path(file).is_file()

  @property
  def points(self) -> dict[str, Any]:
    """{label of a point: its budget}, in order."""
    if not self.budget:
      return {self.label: None}
    return {f"{self.label} {short(value)}": value for value in self.values}

  def entries(self) -> list[dict[str, Any]]:
    """One entry of `LongContextConfig.patterns` a point."""
    common = {"method": self.method, "measure": self.measure}
    common |= dict(self.settings)
    return [
      common | {"label": label} | ({self.budget: value} if self.budget else {})
      for label, value in self.points.items()
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierConfig:
  """What `parse` returns.

  Attributes:
    run: settings of the measurements; a pattern is a point of a sweep.
    sweeps: the patterns at their budgets.
    share: of the dense score that counts as matched.
    search: measure by `frontier_search`; values rise from sparse to full then.
    beside: file of records of another run on the same model, or "". Answers and
      layers of patterns that this run does not measure so are taken from it for
      pictures and tables; times are not, for the device may be another.
    compile_only: compile and measure nothing; with scan_layers only.
  """

  run: long_context_config.LongContextConfig
  sweeps: tuple[Sweep, ...]
  share: float
  search: bool = False
  compile_only: bool = False
  beside: str = ""

  def __post_init__(self):
    checks.check_fraction("config.matched_share", self.share)
    for name in _SWITCHES:
      value = getattr(self, name)
      checks.require(
        isinstance(value, bool), f"config.{name}", "be a bool", value
      )
    checks.require(
      self.beside == "" or pathlib.Path(self.beside).is_file(),
      "config.beside",
      "be a file of records, or empty",
      self.beside,
    )
    checks.require(
      self.run.scan_layers or not self.compile_only,
      "config.compile_only",
      "be False without scan_layers",
      self.compile_only,
    )

    checks.require(
      not self.search or len(self.run.tasks) > 0,
      "config.tasks",
      "not be empty with search",
      self.run.tasks,
    )

  def with_earlier(self, found: list[dict]) -> list[dict]:
    """Records of this run, and of `beside` those that it lacks.

    Args:
      found: of this run, one at least.

    Returns:
      Those of patterns and lengths of this run, with equal settings, come
      before its own. A record without settings is of the line before it.
      None where `beside` is of another model.
    """
    if not self.beside:
      return found
    own = {(r["pattern"], r["length"], r["kind"]) for r in found}
    wanted = {(pattern, length) for pattern, length, _ in own}
    patterns = {p["label"]: p for p in map(_settings, self.run.patterns)}
    ours = found[-1]["settings"].get("model_sha256")
    borrowed, there = [], {}
    for record in records.read(pathlib.Path(self.beside)):
      if settings := record.get("settings"):
        there = {p["label"]: p for p in map(_settings, settings["patterns"])}
        theirs = settings.get("model_sha256")
        if theirs != ours:  # not worth the measurements that were taken
          _LOG.warning("%s is of another model: %s", self.beside, theirs)
          return found
      label, kind = record["pattern"], record["kind"]
      if (
        (label, record["length"]) in wanted
        and (label, record["length"], kind) not in own
        and kind in _BORROWED
        and _BORROWED[kind] in record
        and there.get(label) == patterns.get(label)
      ):
        borrowed.append(record)
    return borrowed + found

  def point(self, label: str) -> tuple[Sweep, Any]:
    """The sweep and the budget of a pattern's label."""
    for sweep in self.sweeps:
      if label in sweep.points:
        return sweep, sweep.points[label]
    raise KeyError(label)


def parse(config: Any) -> FrontierConfig:
  """Builds the settings of the run and its sweeps.

  Args:
    config: fields of `LongContextConfig` but `patterns`; "sweeps", mappings
      with the fields of `Sweep`, other keys being settings of the pattern;
      "matched_share", the share of the dense score that counts as matched; and
      maybe "search", "compile_only" and "beside", see `FrontierConfig`.

  Returns:
    All of them.

  Raises:
    ValueError: an unknown key or a bad value.
  """
  values = flags_and_configs.to_dict(config)
  for name in _OWN:
    if name not in values:
      raise ValueError(f"config must have {name}; got {sorted(values)}.")
  share = values.pop("matched_share")
  switches = {
    name: values.pop(name) for name in (*_SWITCHES, "beside") if name in values
  }
  sweeps = tuple(
    _sweep(sweep, f"config.sweeps[{i}]")
    for i, sweep in enumerate(values.pop("sweeps"))
  )
  for sweep in sweeps:
    if sweep.optional and sweep.is_missing:
      _LOG.warning("%s is left out: its calibration is missing", sweep.label)
  sweeps = tuple(s for s in sweeps if not (s.optional and s.is_missing))
  checks.require(len(sweeps) > 0, "config.sweeps", "not be empty", sweeps)
  values["patterns"] = tuple(e for sweep in sweeps for e in sweep.entries())
  return FrontierConfig(
    run=long_context_config.parse(values),
    sweeps=sweeps,
    share=share,
    **switches,
  )


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


def _settings(pattern: Mapping) -> dict[str, Any]:
  """A pattern's, without what is measured of it, as a record holds them."""
  values = {key: x for key, x in pattern.items() if key != "measure"}
  return json.loads(json.dumps(values))


def short(value: Any) -> str:
  """A budget as text: of heads the first one's sizes, of limits the first."""
  if isinstance(value, tuple):
    first = value[0]
    return " ".join(
      map(str, first[1:] if isinstance(first, tuple) else [first])
    )
  return str(value)
