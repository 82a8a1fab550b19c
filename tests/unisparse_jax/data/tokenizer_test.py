# SPDX-License-Identifier: Apache-2.0
"""Tokenizer: round trip, compositional lines, determinism, bad files."""

import pickle
import random
import re

import numpy as np
import pytest

from unisparse_jax.data import sources
from unisparse_jax.data import tokenizer as tokenizer_lib

_ATOMS = (
  *[
    "\n",
    "\n\n",
    " ",
    "    ",
    "\t",
    "\f",
    "\r",
    "\v",
    "\x1c",
    "\x85",
    "\u2028",
  ],
  *["def", " self", "_len", "__init__", "x", "0", "42", "(", "):", "# ", "é"],
  *["→", "日本", "e\u0301", "<bos>", "<eos>", "<pad>", '"""', "\\n", "'", "."],
)


def _random_text(rng):
  return "".join(rng.choices(_ATOMS, k=rng.randrange(0, 24)))


def test_encoding_is_compositional_by_line(tokenizer):
  rng = random.Random(0)
  for _ in range(4000):
    a, b = _random_text(rng), _random_text(rng).lstrip("\n")
    joined = np.concatenate([tokenizer.encode(a + "\n"), tokenizer.encode(b)])
    np.testing.assert_array_equal(
      tokenizer.encode(a + "\n" + b), joined, err_msg=repr((a, b))
    )


def test_leading_newline_is_the_exception(tokenizer):
  # The property above must be able to fail.
  apart = [*tokenizer.encode("x\n"), *tokenizer.encode("\n\ny")]
  assert tokenizer.encode("x\n\n\ny").tolist() != apart


def test_round_trip(tokenizer):
  rng = random.Random(1)
  for _ in range(1000):
    text = _random_text(rng)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_fast_path_agrees_with_the_library(tokenizer, found):
  rng = random.Random(2)
  texts = [_random_text(rng) for _ in range(2000)]
  texts += [sources.read_source(source.path) for source in found[:40]]
  texts += ["".join(map(chr, range(128))), "_" * 90 + "a" * 90]
  checked = 0
  for text in texts:
    if text and text.isascii():
      checked += 1
      fast = tokenizer.encode(text).tolist()
      assert fast == tokenizer._encode_slowly(text), repr(text[:80])
  assert checked > 300


def test_cache_of_pieces_stays_small(tokenizer, monkeypatch):
  monkeypatch.setattr(tokenizer_lib, "_CACHE_ENTRIES", 10)
  other = pickle.loads(pickle.dumps(tokenizer))
  text = " ".join(
    f"word{chr(97 + i)}{chr(97 + j)}" for i in range(9) for j in range(9)
  )
  assert other.encode(text).tolist() == tokenizer.encode(text).tolist()
  assert len(other._cache) <= 10


def test_digits_indentation_and_newline_are_single_tokens(tokenizer):
  assert len(tokenizer.encode("4096")) == 4
  for width in (4, 8, 12):
    assert len(tokenizer.encode(" " * width)) == 1
    assert len(tokenizer.encode(" " * width + "if")) == 2
  assert tokenizer.encode("x):\n")[-1] == tokenizer.newline_id
  assert tokenizer.encode(" 7\n")[-1] == tokenizer.newline_id


def test_special_strings_are_plain_text(tokenizer):
  special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
  assert len(special) == 3
  assert not special & set(tokenizer.encode("<pad><bos> <eos>").tolist())
  ids = [tokenizer.bos_id, *tokenizer.encode("x = 1"), tokenizer.eos_id]
  assert tokenizer.decode(np.array(ids)) == "x = 1"


def test_training_twice_gives_the_same_bytes(found):
  texts = list(sources.training_texts(found))[:20]
  first = tokenizer_lib.train(texts, vocab_size=600)
  second = tokenizer_lib.train(iter(texts), vocab_size=600)
  assert first.to_json() == second.to_json()
  assert first.vocab_size == 600


def test_save_load_and_pickle(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "tokenizer.json")
  assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
  for other in (
    tokenizer_lib.Tokenizer.load(tmp_path),
    tokenizer_lib.Tokenizer.load(tmp_path / "tokenizer.json"),
    pickle.loads(pickle.dumps(tokenizer)),
  ):
    assert other.to_json() == tokenizer.to_json()
    assert other.encode("<bos>é 1").tolist() == (
      tokenizer.encode("<bos>é 1").tolist()
    )


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "file"
  tokenizer_lib.write_atomically(path, b"old")

  def broken(*_):
    raise OSError("disk full")

  monkeypatch.setattr(tokenizer_lib.os, "replace", broken)
  with pytest.raises(OSError, match="disk full"):
    tokenizer_lib.write_atomically(path, b"new")
  assert path.read_bytes() == b"old"
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bad_files_are_named(tokenizer, tmp_path):
  missing = tmp_path / "none.json"
  with pytest.raises(ValueError, match=re.escape(f"path={missing}")):
    tokenizer_lib.Tokenizer.load(missing)
  broken = tmp_path / "tokenizer.json"
  broken.write_text(tokenizer.to_json()[:-100])
  with pytest.raises(ValueError, match=re.escape(f"path={broken}")):
    tokenizer_lib.Tokenizer.load(broken)
  broken.write_text(tokenizer.to_json().replace("<bos>", "<s>"))
  with pytest.raises(ValueError, match="special token <bos>"):
    tokenizer_lib.Tokenizer.load(broken)
  with pytest.raises(ValueError, match="vocab_size=100"):
    tokenizer_lib.train(["x"], vocab_size=100)
