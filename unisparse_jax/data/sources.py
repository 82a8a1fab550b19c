# SPDX-License-Identifier: Apache-2.0
"""Finds Python sources and decides which of them are held out.

Training reads the standard library of the running Python (its tests too) and
any extra folder of .py files. `HELD_OUT` names the modules that no training
token may come from: they are left out by name, their own tests with them, and
every other file that repeats their lines (a vendored copy, a back-port, another
version) is left out by content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Iterable, Iterator

# Modules or packages of the standard library of Python 3.11 to 3.13.
HELD_OUT = (
  "argparse",
  "ast",
  "base64",
  "bdb",
  "calendar",
  "cmd",
  "compileall",
  "configparser",
  "contextlib",
  "copy",
  "csv",
  "dataclasses",
  "difflib",
  "dis",
  "filecmp",
  "fileinput",
  "fractions",
  "ftplib",
  "gettext",
  "graphlib",
  "gzip",
  "heapq",
  "imaplib",
  "ipaddress",
  "json",
  "mailbox",
  "mimetypes",
  "modulefinder",
  "netrc",
  "optparse",
  "pickle",
  "plistlib",
  "poplib",
  "pprint",
  "pstats",
  "queue",
  "sched",
  "selectors",
  "shelve",
  "shlex",
  "shutil",
  "smtplib",
  "socketserver",
  "statistics",
  "tarfile",
  "tempfile",
  "textwrap",
  "timeit",
  "tomllib",
  "trace",
  "tracemalloc",
  "uuid",
  "wave",
  "weakref",
  "webbrowser",
  "xmlrpc",
  "zipapp",
)

_SKIPPED_FOLDERS = frozenset(
  {"__pycache__", "site-packages", "dist-packages", "node_modules"}
)
# Tables and generated code.
_SKIPPED_STDLIB = ("encodings/", "pydoc_data/")
_SKIPPED_SUFFIXES = ("_gen.py", "_pb2.py", "_pb2_grpc.py")
_MAX_BYTES = 400_000
_MIN_BYTES = 200
_MAX_LINE = 1_000
_BLANKS = b" \t\r\n\f\v"
_DIGITS = b"0123456789"
# All bytes beyond ASCII count as letters.
_LETTERS = bytes(i for i in range(256) if i >= 128 or chr(i).isalpha())
# A line this long says something of its own; shorter ones are in every file.
_TELLING_LINE = 20


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Source:
  """One .py file.

  Attributes:
    name: path below its root with forward slashes, such as "json/decoder.py".
    path: where it lies.
    held_out: whether it belongs to the held-out split.
    stdlib: whether it belongs to the standard library.
  """

  name: str
  path: str
  held_out: bool = False
  stdlib: bool = False


def stdlib_directory() -> str:
  """Folder of the running Python's standard library."""
  return sysconfig.get_paths()["stdlib"]


def site_packages_directories() -> tuple[str, ...]:
  """Folders of installed packages of the running Python."""
  paths = sysconfig.get_paths()
  folders = (paths["purelib"], paths["platlib"])
  return tuple(sorted({os.path.realpath(folder) for folder in folders}))


def find_sources(extra_directories: Iterable[str] = ()) -> list[Source]:
  """Lists training and held-out sources by name, in a fixed order.

  Args:
    extra_directories: folders searched besides the standard library; only
      training files come from them.

  Returns:
    Standard library first, then each extra folder, sorted by name inside each.
    Tests of held-out modules and files named like them are in no split.
  """
  sources = []
  for source in _walk(stdlib_directory()):
    source = dataclasses.replace(source, stdlib=True)
    if is_held_out(source.name):
      sources.append(dataclasses.replace(source, held_out=True))
    elif not source.name.startswith(
      _SKIPPED_STDLIB
    ) and not is_named_like_held_out(source.name):
      sources.append(source)
  if not any(source.held_out for source in sources):
    raise ValueError(
      "the standard library must have its .py sources; got "
      f"directory={stdlib_directory()} with none of the held-out modules."
    )
  for directory in extra_directories:
    if not os.path.isdir(directory):
      raise ValueError(
        "extra_directories must name folders; got "
        f"directory={os.fspath(directory)}."
      )
    for source in _walk(directory):
      if not is_named_like_held_out(source.name):
        sources.append(source)
  return sources


def is_held_out(name: str) -> bool:
  """Whether a path below the standard library is a held-out module."""
  head, _, _ = name.partition("/")
  return head.removesuffix(".py") in HELD_OUT


def is_named_like_held_out(name: str) -> bool:
  """Whether any part of a path is named like a held-out module or its test."""
  for part in name.split("/"):
    part = part.removesuffix(".py")
    if part in HELD_OUT or part.removesuffix("_tests") in HELD_OUT:
      return True
    if part.startswith("test_"):
      # test_zipapp, but also test_json_dump or test_dataclasses_extra.
      stem = part.removeprefix("test_")
      if any(stem == m or stem.startswith(m + "_") for m in HELD_OUT):
        return True
  return False


def read_source(path: str) -> str | None:
  """Reads a source; None for one that is not worth training on.

  Line ends become "\\n", the text does not begin with a newline and ends with
  exactly one.
  """
  try:
    content = pathlib.Path(path).read_bytes()
  except OSError:
    return None
  if not _MIN_BYTES <= len(content) <= _MAX_BYTES or b"\0" in content:
    return None
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError:
    return None
  text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n") + "\n"
  if max(map(len, text.split("\n"))) > _MAX_LINE:
    return None
  solid = content.translate(None, _BLANKS)
  letters = len(solid) - len(solid.translate(None, _LETTERS))
  digits = len(solid) - len(solid.translate(None, _DIGITS))
  if (
    len(solid) < 100
    or letters < 0.5 * len(solid)
    or (digits > 0.2 * len(solid))
  ):
    return None  # tables of numbers or escapes
  return text


def training_texts(found: Iterable[Source]) -> Iterator[str]:
  """Texts of the training split: worth reading, no copy of held-out code."""
  found = list(found)
  held_out_lines = held_out_telling_lines(found)
  for source in found:
    if source.held_out:
      continue
    text = read_source(source.path)
    if text is not None and not repeats(telling_lines(text), held_out_lines):
      yield text


def held_out_telling_lines(found: Iterable[Source]) -> frozenset[int]:
  """`telling_lines` of all held-out files together."""
  lines: set[int] = set()
  for source in found:
    if source.held_out:
      text = read_source(source.path)
      if text is not None:
        lines |= telling_lines(text)
  return frozenset(lines)


def digest(text: str) -> bytes:
  """Content hash that finds exact copies."""
  return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def telling_lines(text: str) -> set[int]:
  """Hashes of the lines that are long enough to recognise a copy by."""
  lines = (line.strip() for line in text.split("\n"))
  return {
    zlib.crc32(line.encode("utf-8"))
    for line in lines
    if len(line) >= _TELLING_LINE
  }


def repeats(lines: set[int], held_out_lines: frozenset[int]) -> bool:
  """Whether a file holds so many held-out lines that it must be a copy.

  Args:
    lines: `telling_lines` of the file.
    held_out_lines: those of all held-out files together.
  """
  shared = len(lines & held_out_lines)
  return (shared >= 5 and shared >= 0.25 * len(lines)) or (
    shared >= 100 and shared >= 0.05 * len(lines)
  )


def _walk(root: str) -> list[Source]:
  found = []
  for folder, folders, files in os.walk(root):
    folders[:] = sorted(
      name
      for name in folders
      if name not in _SKIPPED_FOLDERS and not name.startswith(".")
    )
    for name in files:
      if name.endswith(".py") and not name.endswith(_SKIPPED_SUFFIXES):
        path = os.path.join(folder, name)
        relative = os.path.relpath(path, root).replace(os.sep, "/")
        found.append(Source(name=relative, path=path))
  return sorted(found)
