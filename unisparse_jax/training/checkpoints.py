# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: atomic, checked by a checksum, newest good one wins."""

import dataclasses
import json
import pathlib
import shutil
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from unisparse_jax import records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
  """What a checkpoint held.

  Attributes:
    step: steps done.
    state: pytree of numpy arrays.
    meta: what `Checkpoints.save` was given.
  """

  step: int
  state: Any
  meta: dict[str, Any]


class Checkpoints:
  """Saves and restores a pytree of arrays and a JSON-able mapping by step.

  A checkpoint is written beside its final name and renamed when complete, so a
  killed process leaves the ones before it as they were. `checksums.json` beside
  the directory tells damage before any array is read.

  Args:
    directory: created if missing.
    keep: newest checkpoints kept.
  """

  def __init__(self, directory: pathlib.Path | str, *, keep: int = 2):
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._manager = self._open()
    self._checksum_file = self._directory.parent / "checksums.json"
    self._checksums: dict[str, dict[str, int]] = {}
    if self._checksum_file.exists():
      self._checksums = json.loads(self._checksum_file.read_text())

  def save(self, step: int, state, meta: Mapping[str, Any]):
    """Copies `state` to the host, then writes in the background."""
    self.wait()
    flat = _flatten(jax.device_get(state))
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(flat),
        meta=ocp.args.JsonSave(dict(meta)),
      ),
    )

  def wait(self):
    """Blocks until every save is on disk."""
    self._manager.wait_until_finished()
    steps = {str(step) for step in self._manager.all_steps()}
    if steps == self._checksums.keys():
      return
    known = self._checksums
    self._checksums = {
      step: known[step] if step in known else _checksums(self._directory / step)
      for step in sorted(steps)
    }
    records.write_json(self._checksum_file, self._checksums)

  def restore(self, like) -> Restored | None:
    """Reads the newest good checkpoint.

    Damaged ones are warned about and moved to `damaged/`, and the next older
    is tried.

    Args:
      like: pytree with the wanted structure, shapes and dtypes.

    Returns:
      The checkpoint, or None where none was ever saved.

    Raises:
      ValueError: there are checkpoints, and none is good.
    """
    expected = _flatten(like)
    expected = {
      name: np.empty(x.shape, x.dtype) for name, x in expected.items()
    }
    steps = sorted(self._manager.all_steps(), reverse=True)
    problems = []
    for step in steps:
      try:
        flat, meta = self._read(step, expected)
      except Exception as error:  # Orbax and tensorstore raise many types.
        problems.append((step, f"{type(error).__name__}: {error}"[:500]))
        continue
      for bad, problem in problems:
        warnings.warn(
          f"checkpoint {bad} in {self._directory} is damaged and was moved to "
          f"damaged/; continuing from step {step}. {problem}",
          RuntimeWarning,
          stacklevel=2,
        )
      self._set_aside([bad for bad, _ in problems])
      return Restored(step=step, state=_unflatten(like, flat), meta=meta)
    if problems:
      raise ValueError(
        "workdir must hold at least one readable checkpoint; got "
        f"directory={self._directory}, steps={steps}: "
        + "; ".join(f"step {s}: {p}" for s, p in problems)
      )
    return None

  def close(self):
    """Waits for saves, then frees the manager's threads."""
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True),
    )

  def _read(self, step: int, expected):
    wanted = self._checksums.get(str(step))
    if wanted is not None:
      found = _checksums(self._directory / str(step))
      names = sorted(wanted.keys() | found.keys())
      bad = [name for name in names if wanted.get(name) != found.get(name)]
      if bad:
        raise ValueError(f"files are not as they were written: {bad}")
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(expected),
        meta=ocp.args.JsonRestore(),
      ),
    )
    flat = {name: np.asarray(x) for name, x in restored.state.items()}
    return flat, restored.meta

  def _set_aside(self, steps):
    if not steps:
      return
    self._manager.close()
    for step in steps:
      target = self._directory.parent / "damaged" / str(step)
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(exist_ok=True)
      (self._directory / str(step)).rename(target)
      self._checksums.pop(str(step), None)
    self._manager = self._open()


def _flatten(tree) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _unflatten(like, flat: Mapping[str, np.ndarray]):
  leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
  return jax.tree.unflatten(
    treedef, [flat[jax.tree_util.keystr(path)] for path, _ in leaves]
  )


def _checksums(folder: pathlib.Path) -> dict[str, int]:
  """CRC-32 of every file below a folder, by relative path."""
  return {
    path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes())
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }
