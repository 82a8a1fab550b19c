# SPDX-License-Identifier: Apache-2.0
"""How an experiment begins, and goes on where an earlier call stopped."""

import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from experiments.frame import flags_and_configs
from unisparse_jax import records


class Run(NamedTuple):
  """A folder that belongs to one run.

  Attributes:
    workdir: the folder.
    file: of the records in it.
    writer: of further records.
  """

  workdir: pathlib.Path
  file: pathlib.Path
  writer: records.RecordWriter

  def found(self) -> list[dict[str, Any]]:
    """All records so far, of earlier calls too."""
    return records.read(self.file) if self.file.exists() else []


def begin(workdir: str, identity: Any, *, free: Iterable[str] = ()) -> Run:
  """Claims the folder, sets logging and the compilation cache.

  Args:
    workdir: value of the flag.
    identity: what must agree for two calls to share the folder; the settings
      of every record.
    free: its dotted keys that may change between two calls.

  Raises:
    ValueError: the folder is of a run with another identity.
  """
  folder = records.claim_workdir(workdir, identity, free=free)
  flags_and_configs.start_jax(folder)
  file = folder / "records.jsonl"
  return Run(folder, file, records.RecordWriter(file, identity))
