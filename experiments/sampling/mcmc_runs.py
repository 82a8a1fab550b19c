# SPDX-License-Identifier: Apache-2.0
"""How the sampler experiments begin, and go on where an earlier run stopped."""

import dataclasses
from typing import Any, TypeVar

import jax

from experiments.frame import flags_and_configs, runs

S = TypeVar("S", bound="Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What every config has: a seed, and "float32" or "float64"."""

  seed: int = 0
  dtype: str = "float64"


def begin(
  settings_type: type[S], config: Any, workdir: str
) -> tuple[S, runs.Run]:
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
  return settings, runs.begin(workdir, settings)
