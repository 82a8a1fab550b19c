# SPDX-License-Identifier: Apache-2.0
"""Measurements as JSON lines, and folders that belong to one run each."""

import dataclasses
import datetime
import enum
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

RUN_FILE = "run.json"
_PACKAGES = ("jax", "jaxlib", "flax")


class RecordWriter:
  """Appends one line per measurement, each complete on disk when `write` ends.

  Every line holds what is needed to judge it later: `settings`, the git commit
  of the code and whether the tree had changes, device, versions, UTC time.

  Args:
    path: created with its folders if missing. A line that an earlier process
      left unfinished is cut off.
    settings: of the experiment; dataclasses, enums and arrays are converted.
  """

  def __init__(self, path: pathlib.Path | str, settings: Any):
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._settings = to_json(settings)
    self._environment = environment()
    _cut_unfinished_line(self._path)

  def write(self, **measurement: Any) -> dict[str, Any]:
    """Appends one record.

    Args:
      **measurement: names and values of this record.

    Returns:
      The record as written.

    Raises:
      ValueError: a name is one of those that every record holds.
    """
    common = {
      "settings": self._settings,
      "time_utc": datetime.datetime.now(datetime.UTC).isoformat(
        timespec="seconds"
      ),
      **self._environment,
    }
    if taken := sorted(common.keys() & measurement.keys()):
      raise ValueError(f"measurement must not name {taken}; every record does.")
    record = {**to_json(measurement), **common}
    line = json.dumps(record, allow_nan=False) + "\n"
    # One write of the whole line to a descriptor in append mode.
    descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
      os.write(descriptor, line.encode())
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
    return record


def read(path: pathlib.Path | str) -> list[dict[str, Any]]:
  """All records of a file; an unfinished last line is left out.

  Raises:
    ValueError: a line before the last is not a JSON object.
  """
  data = pathlib.Path(path).read_text(encoding="utf-8")
  lines = data.split("\n")
  unfinished = lines.pop()  # "" where the last line is complete
  records = []
  for number, line in enumerate(lines, start=1):
    records.append(_parse(path, number, line))
  if unfinished:
    try:
      records.append(_parse(path, len(lines) + 1, unfinished))
    except ValueError:
      pass
  return records


def environment() -> dict[str, Any]:
  """Commit, device and versions, as every record holds them."""
  device = jax.devices()[0]
  commit, dirty = git_state(pathlib.Path(__file__).parent)
  return {
    "commit": commit,
    "dirty": dirty,
    "platform": device.platform,
    "device_kind": device.device_kind,
    "num_devices": jax.device_count(),
    "cpu_count": os.cpu_count(),
    "versions": {
      "python": platform.python_version(),
      **{name: _version(name) for name in _PACKAGES},
    },
  }


def git_state(folder: pathlib.Path) -> tuple[str | None, bool | None]:
  """Commit of the checkout that holds `folder`, and whether it has changes.

  Both are None outside a git checkout of this project.
  """

  def git(*args):
    return subprocess.run(
      ["git", "-C", str(folder), *args],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    ).stdout.strip()

  try:
    root = pathlib.Path(git("rev-parse", "--show-toplevel"))
    # An installed copy may lie inside somebody else's repository.
    if not (root / "unisparse_jax").is_dir():
      return None, None
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
  except (OSError, subprocess.SubprocessError):
    return None, None


def claim_workdir(
  workdir: pathlib.Path | str,
  settings: Any,
  *,
  free: Iterable[str] = (),
) -> pathlib.Path:
  """Makes `workdir` belong to the run with these settings.

  Args:
    workdir: created if missing.
    settings: mapping or dataclass, compared by dotted key.
    free: dotted keys that may change between two calls on one folder.

  Returns:
    The path, with `run.json` in it.

  Raises:
    ValueError: the folder belongs to a run with other settings, or holds files
      and no `run.json`. Nothing is written then.
  """
  workdir = pathlib.Path(workdir)
  wanted = to_json(settings)
  path = workdir / RUN_FILE
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"workdir must be a folder; got workdir={workdir}.")
  if path.exists():
    try:
      found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
      raise ValueError(
        f"workdir must hold a readable {RUN_FILE}; got workdir={workdir}: "
        f"{error}."
      ) from error
    differing = _differing(found, wanted, set(free))
    if differing:
      raise ValueError(
        "workdir must be new or belong to this run; got "
        f"workdir={workdir}, which belongs to a run with other settings: "
        + "; ".join(differing)
        + ". Use another workdir."
      )
    return workdir
  if workdir.exists() and any(workdir.iterdir()):
    raise ValueError(
      f"workdir must be empty or hold {RUN_FILE}; got workdir={workdir}, which "
      "holds other files. Use another workdir."
    )
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(path, wanted)
  return workdir


def write_json(path: pathlib.Path | str, value: Any):
  """Writes `value` as JSON: never half a file."""
  write_text(path, json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")


def write_text(path: pathlib.Path | str, text: str):
  """Writes `text` beside `path`, then renames: never half a file."""
  path = pathlib.Path(path)
  with tempfile.NamedTemporaryFile(
    "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
  ) as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.chmod(file.name, 0o644)
  os.replace(file.name, path)


def to_json(value: Any) -> Any:
  """Plain JSON value: dataclasses become objects, NaN and infinities text."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {
      field.name: to_json(getattr(value, field.name))
      for field in dataclasses.fields(value)
    }
    return {"type": type(value).__name__, **fields}
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  if isinstance(value, set | frozenset):
    return sorted(to_json(item) for item in value)
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return to_json(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  if isinstance(value, enum.Enum):
    return to_json(value.value)
  if value is None or isinstance(value, bool | int | float | str):
    return value
  return str(value)


def _parse(path, number: int, line: str) -> dict[str, Any]:
  try:
    record = json.loads(line)
  except json.JSONDecodeError:
    record = None
  if not isinstance(record, dict):
    raise ValueError(
      f"{path} must hold one JSON object per line; got line {number}: "
      f"{line[:80]!r}."
    )
  return record


def _cut_unfinished_line(path: pathlib.Path):
  if not path.exists():
    return
  with path.open("rb+") as file:
    data = file.read()
    if data and not data.endswith(b"\n"):
      file.truncate(data.rfind(b"\n") + 1)


def _differing(found, wanted, free: set[str]) -> list[str]:
  old, new = dict(_dotted(found)), dict(_dotted(wanted))
  missing = object()
  lines = []
  for key in sorted(old.keys() | new.keys()):
    if any(key == name or key.startswith(name + ".") for name in free):
      continue
    a, b = old.get(key, missing), new.get(key, missing)
    if a != b:
      shown = ["absent" if v is missing else repr(v) for v in (a, b)]
      lines.append(f"{key} is {shown[0]} there and {shown[1]} here")
  return lines


def _dotted(value, prefix: str = ""):
  if isinstance(value, Mapping):
    items = value.items()
  elif isinstance(value, list):
    items = enumerate(value)
  else:
    yield prefix, value
    return
  for key, item in items:
    yield from _dotted(item, f"{prefix}.{key}" if prefix else str(key))


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None
