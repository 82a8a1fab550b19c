# SPDX-License-Identifier: Apache-2.0
"""Tokenised Python sources in memory-mapped arrays.

A corpus is a run of files, a file a run of lines, a line a run of tokens. Such
a line stands on its own in the tokenizer: a line of text with its newline and
the empty lines after it. `cache_builder.build_cache` writes the arrays.
"""

from __future__ import annotations

import json
import os
import pathlib
import zlib

import numpy as np

from unisparse_jax.data import code_facts
from unisparse_jax.data import tokenizer as tokenizer_lib

SPLITS = ("train", "held_out")
FORMAT = 1

FACT_DTYPE = np.dtype(
  [
    ("line", np.int64),
    ("scope_line", np.int64),
    ("text", np.int64),
    ("qualifier_len", np.uint16),
    ("name_len", np.uint16),
    ("answer_len", np.uint16),
    ("kind", np.uint8),
  ]
)
# Name and dtype of every array of a split.
ARRAYS = {
  "tokens": np.dtype(np.uint16),
  "line_offsets": np.dtype(np.int64),  # [num_lines + 1], in tokens
  "line_hashes": np.dtype(np.uint32),  # [num_lines], of the stripped text
  "file_lines": np.dtype(np.int64),  # [num_files + 1], in lines
  "facts": FACT_DTYPE,  # sorted by line
  "fact_text": np.dtype(np.uint8),  # UTF-8
}


class CodeCorpus:
  """One split of a cache; pickles as its path.

  Attributes:
    tokens: uint16 [num_tokens], all files one after the other.
    line_offsets: int64 [num_lines + 1], where each line starts in `tokens`.
    line_hashes: uint32 [num_lines]; equal text (blanks around it aside), equal
      hash.
    file_lines: int64 [num_files + 1], where each file starts in lines.
    file_names: str per file, such as "json/decoder.py".
    facts: FACT_DTYPE [num_facts], sorted by line; `fact` spells one out.
    num_bytes: UTF-8 bytes of the text.
    num_stdlib_files: how many of the files are of the standard library; they
      come first.
  """

  def __init__(self, path: str | os.PathLike, split: str = "train"):
    """Opens a split.

    Args:
      path: folder written by `build_cache`.
      split: "train" or "held_out".
    """
    if split not in SPLITS:
      raise ValueError(f"split must be one of {SPLITS}; got split={split!r}.")
    self.path = pathlib.Path(path)
    self.split = split
    meta = read_meta(self.path)
    folder = self.path / split
    arrays = {}
    for name, dtype in ARRAYS.items():
      arrays[name] = _open_array(
        folder / f"{name}.npy", dtype, meta["sizes"][split][name]
      )
    self.tokens: np.ndarray = arrays["tokens"]
    self.line_offsets: np.ndarray = arrays["line_offsets"]
    self.line_hashes: np.ndarray = arrays["line_hashes"]
    self.file_lines: np.ndarray = arrays["file_lines"]
    self.facts: np.ndarray = arrays["facts"]
    self._fact_text: np.ndarray = arrays["fact_text"]
    self.file_names: list[str] = meta["file_names"][split]
    self.num_bytes: int = meta["num_bytes"][split]
    self.num_stdlib_files: int = meta["num_stdlib_files"][split]
    self.tokenizer = tokenizer_lib.Tokenizer.load(self.path)
    if zlib.crc32(self.tokenizer.to_json().encode()) != meta["tokenizer"]:
      raise ValueError(
        "path must hold the tokenizer that wrote the tokens; got another "
        f"tokenizer.json in path={self.path}. Build the cache again."
      )

  def __reduce__(self):
    return (CodeCorpus, (self.path, self.split))

  @property
  def num_tokens(self) -> int:
    return self.tokens.shape[0]

  @property
  def num_lines(self) -> int:
    return self.line_hashes.shape[0]

  @property
  def num_files(self) -> int:
    return len(self.file_names)

  def line_text(self, line: int) -> str:
    """Text of a line, its newlines included."""
    start, stop = self.line_offsets[line : line + 2]
    return self.tokenizer.decode(self.tokens[start:stop])

  def file_text(self, file: int) -> str:
    """Text of a whole file."""
    first, last = self.line_offsets[self.file_lines[file : file + 2]]
    return self.tokenizer.decode(self.tokens[first:last])

  def fact(self, index: int) -> code_facts.Fact:
    """Spells out `facts[index]`; its lines count from the corpus' first."""
    row = self.facts[index]
    start = int(row["text"])
    texts = []
    for name in ("qualifier_len", "name_len", "answer_len"):
      stop = start + int(row[name])
      texts.append(self._fact_text[start:stop].tobytes().decode("utf-8"))
      start = stop
    return code_facts.Fact(
      kind=code_facts.FactKind(int(row["kind"])),
      line=int(row["line"]),
      scope_line=int(row["scope_line"]),
      qualifier=texts[0],
      name=texts[1],
      answer=texts[2],
    )


def read_meta(path: pathlib.Path) -> dict:
  """Reads the description of a cache, checked for its format."""
  if not (path / "meta.json").is_file():
    raise ValueError(
      f"path must be a folder written by build_cache; got path={path} without "
      "meta.json. Build the cache first."
    )
  try:
    meta = json.loads((path / "meta.json").read_bytes())
  except ValueError as error:
    raise ValueError(
      f"path must hold a readable meta.json; got path={path}; {error}"
    ) from error
  if meta.get("format") != FORMAT:
    raise ValueError(
      f"path must hold a cache of format {FORMAT}; got path={path}, "
      f"format={meta.get('format')}. Build the cache again."
    )
  return meta


def _open_array(path: pathlib.Path, dtype: np.dtype, size: int) -> np.ndarray:
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"cache must be complete; got an unreadable {path}; {error}. "
      "Build the cache again."
    ) from error
  if array.dtype != dtype or array.shape != (size,):
    raise ValueError(
      f"cache must be complete; got {path} with shape={array.shape}, "
      f"dtype={array.dtype}; expected ({size},), {dtype}."
    )
  return array
