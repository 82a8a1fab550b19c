# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE tokenizer whose encoding is compositional line by line.

A run of newlines always ends a pre-token and nothing else ever merges across
it, so a token stream can be put together from lines encoded one at a time:

  encode(a + "\\n" + b) == concat(encode(a + "\\n"), encode(b))

for every b that does not begin with a newline. Digits are single tokens, a run
of two or more blanks (indentation) is one pre-token, and the newline that ends
an answer is a token of its own, `newline_id`.
"""

from __future__ import annotations

import os
import pathlib
import re
import tempfile
from collections.abc import Iterable

import numpy as np
import tokenizers

from unisparse_jax.data import sources

PAD = "<pad>"
BOS = "<bos>"
EOS = "<eos>"
VOCAB_SIZE = 4096

# In order: blanks that end a line with its newlines; indentation; a word with
# its leading blank or underscore; one digit; punctuation; a single blank.
_PRE_TOKEN = (
  r"[^\S\n]*\n+"
  r"|[^\S\n]{2,}"
  r"|[ _]?\p{L}+"
  r"|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+"
  r"|[^\S\n]"
)

# The same rule on ASCII text, where Python's `re` can apply it. Looking
# pre-tokens up in a dict is 4 times faster than the library's encode.
_ASCII_PRE_TOKEN = re.compile(
  r"[^\S\n]*\n+"
  r"|[^\S\n]{2,}"
  r"|[ _]?[A-Za-z]+"
  r"|[0-9]"
  r"| ?[^\sA-Za-z0-9]+"
  r"|[^\S\n]",
  re.ASCII,
)
_CACHE_ENTRIES = 200_000
_CACHE_CHARS = 40


class Tokenizer:
  """Byte-level BPE with the special tokens <pad>, <bos> and <eos>.

  Special strings inside a text are encoded as plain text: special ids never
  come out of `encode`.
  """

  def __init__(self, backend: tokenizers.Tokenizer):
    for token in (PAD, BOS, EOS):
      if backend.token_to_id(token) is None:
        raise ValueError(
          f"tokenizer must have the special token {token}; got "
          f"vocab_size={backend.get_vocab_size()} without it."
        )
    backend.encode_special_tokens = True
    self._backend = backend
    self._cache: dict[str, list[int]] = {}
    self.pad_id: int = backend.token_to_id(PAD)
    self.bos_id: int = backend.token_to_id(BOS)
    self.eos_id: int = backend.token_to_id(EOS)
    newline = backend.encode("\n", add_special_tokens=False).ids
    self.newline_id: int = newline[0]

  @classmethod
  def load(cls, path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer.json (or the one in a folder)."""
    path = pathlib.Path(path)
    if path.is_dir():
      path = path / "tokenizer.json"
    if not path.is_file():
      raise ValueError(f"path must name a tokenizer.json; got path={path}.")
    try:
      return cls.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise ValueError(
        f"path must name a readable tokenizer.json; got path={path}; {error}"
      ) from error

  @classmethod
  def from_json(cls, text: str) -> Tokenizer:
    """Builds a tokenizer from the text of a tokenizer.json."""
    try:
      backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
      raise ValueError(f"text must be a tokenizer.json; got {error}") from error
    return cls(backend)

  def to_json(self) -> str:
    """Returns the text of a tokenizer.json."""
    return self._backend.to_str(pretty=False)

  def save(self, path: str | os.PathLike) -> None:
    """Writes a tokenizer.json in one step (temporary file, then rename)."""
    write_atomically(path, self.to_json().encode("utf-8"))

  def __reduce__(self):
    return (Tokenizer.from_json, (self.to_json(),))

  @property
  def vocab_size(self) -> int:
    return self._backend.get_vocab_size()

  def encode(self, text: str) -> np.ndarray:
    """Encodes a text.

    Args:
      text: any string; no special token is added or recognised.

    Returns:
      int32 [num_tokens].
    """
    if not text.isascii():
      return np.asarray(self._encode_slowly(text), dtype=np.int32)
    ids: list[int] = []
    cache = self._cache
    for piece in _ASCII_PRE_TOKEN.findall(text):
      known = cache.get(piece)
      if known is None:
        known = self._encode_slowly(piece)
        if len(piece) <= _CACHE_CHARS:
          if len(cache) >= _CACHE_ENTRIES:
            cache.clear()
          cache[piece] = known
      ids += known
    return np.asarray(ids, dtype=np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """Turns tokens back into text; special tokens vanish."""
    ids = [int(i) for i in ids]
    return self._backend.decode(ids, skip_special_tokens=True)

  def _encode_slowly(self, text: str) -> list[int]:
    return self._backend.encode(text, add_special_tokens=False).ids


def train(texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
  """Trains a tokenizer; the same texts give the same tokenizer.

  Args:
    texts: training texts.
    vocab_size: entries, special tokens and the 256 bytes included.

  Returns:
    A tokenizer with at most `vocab_size` entries.
  """
  minimum = 256 + 3
  if vocab_size < minimum:
    raise ValueError(
      f"vocab_size must be at least {minimum}; got vocab_size={vocab_size}."
    )
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(_PRE_TOKEN), behavior="isolated"
      ),
      tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
      ),
    ]
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[PAD, BOS, EOS],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer=trainer)
  return Tokenizer(backend)


def train_on_standard_library(
  path: str | os.PathLike, *, vocab_size: int = VOCAB_SIZE
) -> Tokenizer:
  """Trains on the running Python's library without the held-out modules.

  Args:
    path: tokenizer.json to write.
    vocab_size: entries, special tokens and the 256 bytes included.

  Returns:
    The tokenizer; the same Python gives the same one.
  """
  found = sources.find_sources()
  tokenizer = train(sources.training_texts(found), vocab_size=vocab_size)
  tokenizer.save(path)
  return tokenizer


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file so that a reader sees the old content or all of the new."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise
