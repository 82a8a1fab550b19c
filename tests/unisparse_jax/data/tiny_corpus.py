# SPDX-License-Identifier: Apache-2.0
"""A small corpus of real standard-library files, built once a session."""

import pytest

from unisparse_jax.data import cache_builder, code_corpus, sources
from unisparse_jax.data import tokenizer as tokenizer_lib

_FOLDERS = ("asyncio/", "collections/", "email/", "http/", "unittest/")
_HELD_OUT = (
  "argparse.py",
  "calendar.py",
  "configparser.py",
  "csv.py",
  "heapq.py",
  "queue.py",
  "shelve.py",
  "statistics.py",
  "tarfile.py",
  "textwrap.py",
)


@pytest.fixture(scope="session")
def found():
  return [
    source
    for source in sources.find_sources()
    if source.name in _HELD_OUT
    or (not source.held_out and source.name.startswith(_FOLDERS))
  ]


@pytest.fixture(scope="session")
def tokenizer(found):
  return tokenizer_lib.train(sources.training_texts(found), vocab_size=1024)


@pytest.fixture(scope="session")
def cache(found, tokenizer, tmp_path_factory):
  return cache_builder.build_cache(
    tmp_path_factory.mktemp("data") / "cache",
    tokenizer,
    found=found,
    num_processes=1,
  )


@pytest.fixture(scope="session")
def train_corpus(cache):
  return code_corpus.CodeCorpus(cache, "train")


@pytest.fixture(scope="session")
def held_out_corpus(cache):
  return code_corpus.CodeCorpus(cache, "held_out")
