# SPDX-License-Identifier: Apache-2.0
"""What every main shares: its two flags, and configs as frozen dataclasses."""

import dataclasses
import enum
import functools
import logging
import os
import pathlib
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

T = TypeVar("T")
_END_SECONDS = 30.0


@functools.cache
def define() -> tuple[flags.FlagHolder, flags.FlagHolder]:
  """Defines --config and --workdir, at the top of a main.

  Two mains imported by one process, as tests do, share the flags.

  Returns:
    Holders of the config and of the workdir.
  """
  config = config_flags.DEFINE_config_file(
    "config",
    None,
    "File with get_config(). Override a field with --config.FIELD=VALUE.",
    lock_config=True,
  )
  flags.mark_flag_as_required("config")
  _list_in_help(config)
  return config, define_workdir()


@functools.cache
def define_workdir() -> flags.FlagHolder:
  """Defines --workdir alone, at the top of a main that takes no config."""
  workdir = flags.DEFINE_string(
    "workdir", None, "Folder for everything that is written.", required=True
  )
  _list_in_help(workdir)
  return workdir


def _list_in_help(holder):
  """As a flag of the main itself, which --help lists."""
  flags.FLAGS.register_key_flag_for_module(
    sys.argv[0], flags.FLAGS[holder.name]
  )


def start_jax(workdir: str | os.PathLike | None = None):
  """Sets logging and, where a folder is given, the compilation cache in it.

  A cache that the environment names (JAX_COMPILATION_CACHE_DIR) stays.
  """
  absl_logging.set_verbosity(
    absl_logging.WARNING
  )  # Orbax and grain are chatty.
  for name in ("experiments", "unisparse_jax"):
    logging.getLogger(name).setLevel(logging.INFO)
  if workdir is not None:
    cache = pathlib.Path(workdir).absolute() / "compilation_cache"
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
      jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def run(main: Callable[[list[str]], Any]):
  """`absl.app.run`, with one line for an override of an unknown key."""

  def parse(argv):
    try:
      return app.parse_flags_with_usage(argv)
    except AttributeError as error:  # What ml_collections raises.
      sys.exit(
        "ValueError: config must have known keys only; got an override of "
        f"{error}."
      )

  code = 1
  try:
    app.run(main, flags_parser=parse)
    code = 0
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else int(bool(error.code))
    raise
  finally:
    _end_within(_END_SECONDS, code)


def _end_within(seconds: float, code: int):
  """Ends the process even if a library's threads keep it alive."""

  def end():
    time.sleep(seconds)
    os._exit(code)

  threading.Thread(target=end, daemon=True).start()


def to_dict(config: Any) -> dict[str, Any]:
  """A ConfigDict or mapping as nested dicts."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return dict(config)


def check_keys(name: str, config: Any, allowed: typing.Collection[str]):
  """Raises ValueError where `config` has a key that is not allowed."""
  if unknown := sorted(to_dict(config).keys() - set(allowed)):
    raise ValueError(
      f"{name} must have known keys only; got unknown {unknown}; expected "
      f"keys among {sorted(allowed)}."
    )


def to_dataclass(cls: type[T], config: Any, *, name: str) -> T:
  """Builds a frozen dataclass from a part of a config.

  Nested dataclasses, tuples of dataclasses and enums are built too; the class
  checks the values.

  Args:
    cls: dataclass to build.
    config: ConfigDict or mapping from field name to value.
    name: of this part, for messages, such as "config.train".

  Raises:
    ValueError: an unknown key, or a field without default that is missing.
  """
  values = to_dict(config)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  check_keys(name, values, fields)
  missing = [
    key
    for key, field in fields.items()
    if key not in values
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(
      f"{name} must have every field without a default of {cls.__name__}; "
      f"got none for {missing}."
    )
  hints = typing.get_type_hints(cls)
  return cls(
    **{
      key: _convert(hints[key], value, f"{name}.{key}")
      for key, value in values.items()
    }
  )


def _convert(hint: Any, value: Any, name: str) -> Any:
  """`value` as the type hint wants it, or unchanged."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None:
      return None
    options = [option for option in arguments if option is not type(None)]
    hint = options[0]
    if len(options) > 1:
      return value
    return _convert(hint, value, name)
  if origin is tuple and isinstance(value, list | tuple):
    inner = arguments[0] if arguments else Any
    return tuple(
      _convert(inner, item, f"{name}[{i}]") for i, item in enumerate(value)
    )
  if isinstance(value, ml_collections.ConfigDict | Mapping):
    if dataclasses.is_dataclass(hint):
      return to_dataclass(hint, value, name=name)
    return value
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    try:
      return hint(value)
    except ValueError as error:
      expected = [member.value for member in hint]
      raise ValueError(
        f"{name} must be one of {expected}; got {value!r}."
      ) from error
  return value
