# SPDX-License-Identifier: Apache-2.0
"""Cache of tokens: contents, splits, determinism, damage."""

import dataclasses
import pickle
import re
import shutil
import zlib

import numpy as np
import pytest

from unisparse_jax.data import (
  cache_builder,
  code_corpus,
  code_facts,
  sources,
  training_rows,
)
from unisparse_jax.data import tokenizer as tokenizer_lib


def _file_bytes(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.mark.parametrize("split", code_corpus.SPLITS)
def test_text_comes_back(cache, found, split):
  corpus = code_corpus.CodeCorpus(cache, split)
  paths = {s.name: s.path for s in found if s.held_out == (split == "held_out")}
  assert corpus.num_files > 5
  for file in range(0, corpus.num_files, 7):
    text = corpus.file_text(file)
    assert text == sources.read_source(paths[corpus.file_names[file]])
  total = sum(
    len(sources.read_source(paths[name]).encode()) for name in corpus.file_names
  )
  assert corpus.num_bytes == total


def test_lines_stand_on_their_own(held_out_corpus):
  corpus, tokenizer = held_out_corpus, held_out_corpus.tokenizer
  rng = np.random.default_rng(0)
  for line in rng.integers(0, corpus.num_lines, 300):
    text = corpus.line_text(line)
    assert re.fullmatch(r"[^\n]+\n+", text)
    start, stop = corpus.line_offsets[line : line + 2]
    np.testing.assert_array_equal(
      tokenizer.encode(text), corpus.tokens[start:stop]
    )
    assert corpus.line_hashes[line] == zlib.crc32(text.strip().encode())
  assert corpus.line_offsets[-1] == corpus.num_tokens
  assert corpus.file_lines[-1] == corpus.num_lines
  assert np.all(np.diff(corpus.line_offsets) > 0)


def test_facts_are_in_the_text(held_out_corpus):
  corpus = held_out_corpus
  kinds = set()
  assert np.all(np.diff(corpus.facts["line"]) >= 0)
  for i in range(0, len(corpus.facts), 3):
    fact = corpus.fact(i)
    kinds.add(fact.kind)
    assert fact.name in corpus.line_text(fact.line)
    assert fact.answer in corpus.line_text(fact.line)
    assert fact.qualifier in corpus.line_text(fact.scope_line)
  assert kinds >= {
    code_facts.FactKind.METHOD,
    code_facts.FactKind.FUNCTION,
    code_facts.FactKind.BASES,
    code_facts.FactKind.CONSTANT,
  }


def test_held_out_text_is_not_in_train(cache):
  train = code_corpus.CodeCorpus(cache, "train")
  held_out = code_corpus.CodeCorpus(cache, "held_out")
  assert not set(train.file_names) & set(held_out.file_names)
  known = sources.telling_lines(
    "".join(held_out.file_text(i) for i in range(held_out.num_files))
  )
  for file in range(train.num_files):
    lines = sources.telling_lines(train.file_text(file))
    shared = len(lines & known)
    assert shared < max(5, 0.25 * len(lines)), train.file_names[file]


def test_processes_do_not_change_the_bytes(cache, found, tokenizer, tmp_path):
  other = cache_builder.build_cache(
    tmp_path / "cache", tokenizer, found=found, num_processes=2
  )
  assert _file_bytes(other) == _file_bytes(cache)
  assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_exact_copies_are_taken_once(found, tokenizer, tmp_path):
  copy = next(s for s in found if s.name == "asyncio/locks.py")
  copied = dataclasses.replace(copy, name="zz/locks.py", stdlib=False)
  path = cache_builder.build_cache(
    tmp_path / "cache", tokenizer, found=[*found, copied], num_processes=1
  )
  names = code_corpus.CodeCorpus(path).file_names
  assert "asyncio/locks.py" in names
  assert "zz/locks.py" not in names


def test_standard_library_comes_first(found, tokenizer, tmp_path):
  extra = tmp_path / "aa_extra.py"
  extra.write_text("def another_function(argument):\n  return argument\n" * 9)
  source = sources.Source(name="aa_extra.py", path=str(extra))
  path = cache_builder.build_cache(
    tmp_path / "cache", tokenizer, found=[source, *found], num_processes=1
  )
  corpus = code_corpus.CodeCorpus(path)
  assert corpus.num_stdlib_files == corpus.num_files - 1
  assert corpus.file_names[-1] == "aa_extra.py"


def test_build_again_keeps_the_cache(cache, found, tokenizer):
  before = (cache / "meta.json").stat()
  assert cache_builder.build_cache(cache, tokenizer, found=found) == cache
  assert (cache / "meta.json").stat() == before
  with pytest.raises(ValueError, match=r"directory must be new.*other sources"):
    cache_builder.build_cache(cache, tokenizer, found=found[1:])
  other = tokenizer_lib.train(["some text"], vocab_size=300)
  with pytest.raises(ValueError, match=r"directory must be new"):
    cache_builder.build_cache(cache, other, found=found)


def test_failed_build_leaves_nothing(found, tokenizer, tmp_path):
  train_only = [source for source in found if not source.held_out]
  with pytest.raises(ValueError, match="none for held_out"):
    cache_builder.build_cache(
      tmp_path / "cache", tokenizer, found=train_only, num_processes=1
    )
  assert list(tmp_path.iterdir()) == []


def test_corpus_pickles_as_its_path(held_out_corpus):
  data = pickle.dumps(held_out_corpus)
  assert len(data) < 1000
  other = pickle.loads(data)
  assert other.split == "held_out"
  np.testing.assert_array_equal(other.tokens, held_out_corpus.tokens)


def test_bad_split_and_missing_cache(cache, tmp_path):
  with pytest.raises(ValueError, match=r"split must be one of.*split='test'"):
    code_corpus.CodeCorpus(cache, "test")
  missing = tmp_path / "none"
  with pytest.raises(ValueError, match=r"path must.*none.*Build the cache"):
    code_corpus.CodeCorpus(missing)
  with pytest.raises(ValueError, match="num_processes=0"):
    cache_builder.build_cache(
      missing, tokenizer_lib.train(["x"], vocab_size=260), num_processes=0
    )


@pytest.mark.parametrize("name", sorted(code_corpus.ARRAYS))
def test_truncated_cache_is_named(cache, tmp_path, name):
  copy = tmp_path / "cache"
  shutil.copytree(cache, copy)
  path = copy / "train" / f"{name}.npy"
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(ValueError, match=rf"cache must be complete.*{name}"):
    code_corpus.CodeCorpus(copy)
  path.unlink()
  with pytest.raises(ValueError, match=rf"cache must be complete.*{name}"):
    code_corpus.CodeCorpus(copy)


def test_damaged_description_or_tokenizer_is_named(cache, tmp_path):
  copy = tmp_path / "cache"
  shutil.copytree(cache, copy)
  tokenizer_lib.train(["text"], vocab_size=300).save(copy / "tokenizer.json")
  with pytest.raises(ValueError, match="another tokenizer"):
    code_corpus.CodeCorpus(copy)
  meta = (copy / "meta.json").read_text()
  (copy / "meta.json").write_text(meta.replace('"format": ', '"format": 9'))
  with pytest.raises(ValueError, match="must hold a cache of format"):
    code_corpus.CodeCorpus(copy)
  (copy / "meta.json").write_text(meta[:50])
  with pytest.raises(ValueError, match=r"readable meta\.json"):
    code_corpus.CodeCorpus(copy)
  shorter = np.load(copy / "train" / "tokens.npy")[:-1]
  (copy / "meta.json").write_text(meta)
  np.save(copy / "train" / "tokens.npy", shorter)
  with pytest.raises(ValueError, match=r"cache must be complete.*tokens"):
    training_rows.TrainingRows(code_corpus.CodeCorpus(copy), 0, 64)
