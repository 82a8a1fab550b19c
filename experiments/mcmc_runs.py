# SPDX-License-Identifier: Apache-2.0
"""How the sampler experiments begin, and go on where an earlier run stopped."""

import dataclasses
import pathlib
from typing import Any, NamedTuple, TypeVar

import jax

from experiments import flags_and_configs
from unisparse_jax import records

S = TypeVar("S", bound="Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What every config has: a seed, and "float32" or "float64"."""

  seed: int = 0
  dtype: str = "float64"


class Begun(NamedTuple):
  """A folder that belongs to the run.

  Attributes:
    workdir: the folder.
    file: of the records in it.
    writer: of further records.
  """

  workdir: pathlib.Path
  file: pathlib.Path
  writer: records.RecordWriter

  def found(self) -> list[dict[str, Any]]:
    """All records so far, of earlier runs too."""
    return records.read(self.file) if self.file.exists() else []


def begin(settings_type: type[S], config: Any, workdir: str) -> tuple[S, Begun]:
  """Reads the config, sets JAX's precision and claims the folder.

  Args:
    settings_type: frozen dataclass of the config.
    config: value of the flag.
    workdir: value of the flag.

  Raises:
    ValueError: unknown keys, or a folder of a run with other settings.
  """
  settings = flags_and_configs.to_dataclass(
    settings_type, config, name="config"
  )
  jax.config.update("jax_enable_x64", settings.dtype == "float64")
  folder = records.claim_workdir(workdir, settings)
  flags_and_configs.start_jax(folder)
  file = folder / "records.jsonl"
  return settings, Begun(folder, file, records.RecordWriter(file, settings))
