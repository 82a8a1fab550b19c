# SPDX-License-Identifier: Apache-2.0
"""Tokenises Python sources into a cache, in parallel processes.

The result depends on the sources and the tokenizer alone, not on the number of
processes, and its folder appears in one step.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from unisparse_jax.data import code_corpus, code_facts, sources
from unisparse_jax.data import tokenizer as tokenizer_lib

_CHUNK_BYTES = 1_500_000


def build_cache(
  directory: str | os.PathLike,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  extra_directories: Iterable[str] = (),
  num_processes: int | None = None,
  found: Sequence[sources.Source] | None = None,
) -> pathlib.Path:
  """Tokenises the standard library and extra folders into a cache.

  The folder appears in one step when all is written. A cache that is there
  already with the same tokenizer and sources is kept as it is.

  Args:
    directory: folder to write.
    tokenizer: encodes the text; a copy of it goes into the cache.
    extra_directories: folders of .py files besides the standard library.
    num_processes: worker processes; default one per CPU. 1 stays in process.
    found: sources to take instead of `sources.find_sources`.

  Returns:
    The folder.

  Raises:
    ValueError: the folder holds something else.
  """
  directory = pathlib.Path(directory)
  if num_processes is None:
    num_processes = len(os.sched_getaffinity(0))
  if num_processes < 1:
    raise ValueError(
      f"num_processes must be at least 1; got num_processes={num_processes}."
    )
  if tokenizer.vocab_size > 2**16:
    raise ValueError(
      "tokenizer must have at most 65536 entries; got "
      f"vocab_size={tokenizer.vocab_size}."
    )
  if found is None:
    found = sources.find_sources(extra_directories)
  identity = _identity(found)
  if directory.exists():
    meta = code_corpus.read_meta(directory)
    same_tokenizer = meta["tokenizer"] == zlib.crc32(
      tokenizer.to_json().encode()
    )
    if same_tokenizer and meta["identity"] == identity:
      return directory
    raise ValueError(
      "directory must be new or hold the same cache; got "
      f"directory={directory}, built from other sources or with another "
      "tokenizer. Remove it or name another."
    )
  chunks = list(_chunks(found))
  initial = (tokenizer.to_json(), sources.held_out_telling_lines(found))
  if num_processes == 1 or len(chunks) == 1:
    _set_worker(*initial)
    results = map(_tokenise_chunk, chunks)
    return _write(directory, tokenizer, identity, results)
  # Workers read what they need from a file: as arguments it fills the pipe to
  # a new process, which blocks until that one has imported everything, so that
  # 16 workers started one after the other (107 s instead of 15 for 89M tokens).
  with tempfile.NamedTemporaryFile() as file:
    pickle.dump(initial, file)
    file.flush()
    with concurrent.futures.ProcessPoolExecutor(
      min(num_processes, len(chunks)),
      mp_context=multiprocessing.get_context("spawn"),
      initializer=_start_worker,
      initargs=(file.name,),
    ) as pool:
      results = pool.map(_tokenise_chunk, chunks)
      return _write(directory, tokenizer, identity, results)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
  """A tokenised file, its lines counted from 0."""

  name: str
  held_out: bool
  stdlib: bool
  digest: bytes
  num_bytes: int
  tokens: np.ndarray  # uint16 [num_tokens]
  line_offsets: np.ndarray  # int64 [num_lines]: start of each
  line_hashes: np.ndarray  # uint32 [num_lines]
  facts: np.ndarray  # code_corpus.FACT_DTYPE
  fact_text: bytes


# Set once in each worker process by `_start_worker`.
_worker: dict = {}


def _start_worker(path: str) -> None:
  with open(path, "rb") as file:
    _set_worker(*pickle.load(file))


def _set_worker(tokenizer_json: str, held_out_lines: frozenset[int]) -> None:
  tokenizer = tokenizer_lib.Tokenizer.from_json(tokenizer_json)
  pieces = [
    tokenizer.decode([i]) if i > 2 else "" for i in range(tokenizer.vocab_size)
  ]
  _worker["tokenizer"] = tokenizer
  _worker["ends_line"] = np.array([p.endswith("\n") for p in pieces])
  _worker["starts_newline"] = np.array([p.startswith("\n") for p in pieces])
  _worker["held_out_lines"] = held_out_lines


def _tokenise_chunk(chunk: list[sources.Source]) -> list[_File]:
  files = []
  for source in chunk:
    text = sources.read_source(source.path)
    if text is None:
      continue
    if not source.held_out and sources.repeats(
      sources.telling_lines(text), _worker["held_out_lines"]
    ):
      continue
    module = code_facts.parse(text)
    if module is not None:
      files.append(_tokenise(source, text, module))
  return files


def _tokenise(source, text, module) -> _File:
  tokens = _worker["tokenizer"].encode(text)
  # A line ends after a newline that no further newline follows.
  ends = _worker["ends_line"][tokens]
  ends[:-1] &= ~_worker["starts_newline"][tokens[1:]]
  line_offsets = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
  lines = text.split("\n")[:-1]
  # Empty lines belong to the line before them.
  new_lines = np.array([bool(line) for line in lines])
  line_index = np.cumsum(new_lines) - 1
  hashes = [zlib.crc32(line.strip().encode()) for line in lines if line]
  assert len(hashes) == len(line_offsets), f"lines of {source.name} misfit"
  facts = code_facts.find_facts(text, module)
  table = np.zeros(len(facts), code_corpus.FACT_DTYPE)
  blob = bytearray()
  for row, fact in zip(table, facts, strict=True):
    texts = [t.encode() for t in (fact.qualifier, fact.name, fact.answer)]
    row["line"] = line_index[fact.line]
    row["scope_line"] = line_index[fact.scope_line]
    row["text"] = len(blob)
    row["qualifier_len"], row["name_len"], row["answer_len"] = map(len, texts)
    row["kind"] = fact.kind
    for part in texts:
      blob += part
  return _File(
    name=source.name,
    held_out=source.held_out,
    stdlib=source.stdlib,
    digest=sources.digest(text),
    num_bytes=len(text.encode()),
    tokens=tokens.astype(np.uint16),
    line_offsets=line_offsets.astype(np.int64),
    line_hashes=np.array(hashes, np.uint32),
    facts=table,
    fact_text=bytes(blob),
  )


def _write(directory, tokenizer, identity, results) -> pathlib.Path:
  files: dict[str, list[_File]] = {split: [] for split in code_corpus.SPLITS}
  seen: set[bytes] = set()
  for batch in results:
    for file in batch:
      if file.held_out:
        files["held_out"].append(file)
      elif file.digest not in seen:
        seen.add(file.digest)
        files["train"].append(file)
  for split in code_corpus.SPLITS:
    if not files[split]:
      raise ValueError(
        f"sources must give files for both splits; got none for {split}."
      )
    # Stable: the standard library first, else in the order found.
    files[split].sort(key=lambda file: not file.stdlib)
  directory.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(
    tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.")
  )
  try:
    meta: dict = {
      "format": code_corpus.FORMAT,
      "identity": identity,
      "tokenizer": zlib.crc32(tokenizer.to_json().encode()),
      "sizes": {},
      "file_names": {},
      "num_bytes": {},
      "num_stdlib_files": {},
    }
    for split in code_corpus.SPLITS:
      arrays = _join(files[split])
      (temporary / split).mkdir()
      for name, dtype in code_corpus.ARRAYS.items():
        assert arrays[name].dtype == dtype, f"{name} has the wrong dtype"
        np.save(temporary / split / f"{name}.npy", arrays[name])
      meta["sizes"][split] = {k: len(a) for k, a in arrays.items()}
      meta["file_names"][split] = [file.name for file in files[split]]
      meta["num_bytes"][split] = sum(file.num_bytes for file in files[split])
      meta["num_stdlib_files"][split] = sum(f.stdlib for f in files[split])
    tokenizer.save(temporary / "tokenizer.json")
    tokenizer_lib.write_atomically(
      temporary / "meta.json", json.dumps(meta).encode()
    )
    os.chmod(temporary, 0o755)
    os.rename(temporary, directory)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  return directory


def _join(files: list[_File]) -> dict[str, np.ndarray]:
  """Arrays of a split from its files, offsets moved to the whole."""
  token_starts = np.cumsum([0] + [len(file.tokens) for file in files])
  line_starts = np.cumsum([0] + [len(file.line_hashes) for file in files])
  text_starts = np.cumsum([0] + [len(file.fact_text) for file in files])
  offsets, facts = [], []
  for i, file in enumerate(files):
    offsets.append(file.line_offsets + token_starts[i])
    table = file.facts.copy()
    table["line"] += line_starts[i]
    table["scope_line"] += line_starts[i]
    table["text"] += text_starts[i]
    facts.append(table)
  text = b"".join(file.fact_text for file in files)
  return {
    "tokens": np.concatenate([file.tokens for file in files]),
    "line_offsets": np.concatenate([*offsets, token_starts[-1:]]),
    "line_hashes": np.concatenate([file.line_hashes for file in files]),
    "file_lines": line_starts.astype(np.int64),
    "facts": np.concatenate(facts),
    "fact_text": np.frombuffer(text, np.uint8),
  }


def _chunks(found: Sequence[sources.Source]):
  chunk: list[sources.Source] = []
  size = 0
  for source in found:
    chunk.append(source)
    size += os.path.getsize(source.path)
    if size >= _CHUNK_BYTES:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk


def _identity(found: Sequence[sources.Source]) -> int:
  """Checksum of names, sizes and splits of the sources."""
  checksum = code_corpus.FORMAT
  for source in found:
    entry = f"{source.name} {os.path.getsize(source.path)} {source.held_out}\n"
    checksum = zlib.crc32(entry.encode("utf-8", "surrogateescape"), checksum)
  return checksum
