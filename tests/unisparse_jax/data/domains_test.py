# SPDX-License-Identifier: Apache-2.0
"""Generated text follows its rules; prompts have the length asked for."""

import csv
import io
import json
import pickle
import re
import shutil

import numpy as np
import pytest

from unisparse_jax.data import code_corpus, docs_text, domains, generated_text


def test_word_problems_add_up():
  for seed in range(60):
    text = generated_text.word_problem(np.random.default_rng(seed))
    for left, sign, right, value in re.findall(
      r"(\d+) ([-+*/]) (\d+) = (\d+)", text
    ):
      a, b = int(left), int(right)
      found = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[sign]
      assert found == int(value), text
    answer = re.search(r"Answer: (\d+)\n\n$", text)
    assert answer, text
    assert answer[1] in text[: answer.start()]


def test_tables_say_the_same_twice():
  seen = set()
  for seed in range(60):
    text = generated_text.table(np.random.default_rng(seed))
    parts = dict(re.findall(r"# \w+ as ([\w ]+)\n(.*?)\n(?=#|\n$)", text, re.S))
    assert len(parts) == 2, text
    seen |= parts.keys()
    if "JSON" in parts and "JSON lines" in parts:
      assert json.loads(parts["JSON"]) == json.loads(parts["JSON lines"])
    if "JSON" in parts and "CSV" in parts:
      rows = list(csv.DictReader(io.StringIO(parts["CSV"])))
      first = json.loads(parts["JSON"])[0]
      assert {k: str(v).lower() for k, v in first.items()} == {
        k: v.lower() for k, v in rows[0].items()
      }
  assert seen == {"CSV", "JSON lines", "JSON", "Markdown", "YAML"}


def test_docs_keep_signatures_and_docstrings():
  source = '''"""A module that does much, as this long line of its own says."""
class A(Base):
  """A class with a docstring that is long enough to be kept, at sixty."""
  def f(self, x: int = 1):
    """A method with a docstring that is long enough to be kept, at sixty."""
  def g(self): "short"
'''
  text = docs_text.module_docs("pkg/mod.py", source)
  assert text.startswith("pkg.mod\n=======\n")
  assert "class A(Base)\n    A class with" in text
  assert "A.f(self, x: int=1)\n    A method with" in text
  assert "short" not in text
  assert docs_text.module_docs("a.py", "def f(:") == ""
  assert docs_text.module_docs("a.py", "x = 1\n") == ""


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_prompts(held_out_corpus, domain):
  first, second = (
    domains.prompt(domain, np.random.default_rng(seed), held_out_corpus, 700)
    for seed in (0, 1)
  )
  again = domains.prompt(domain, np.random.default_rng(0), held_out_corpus, 700)
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, second)
  assert first[0] == held_out_corpus.tokenizer.bos_id
  if domain == "long_context":
    assert 350 <= len(first) <= 700
  else:
    assert len(first) == 700


def test_names_what_is_wrong(held_out_corpus):
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match="domain must be one of"):
    domains.prompt("poems", rng, held_out_corpus, 64)
  with pytest.raises(ValueError, match="num_tokens must be at least 2"):
    domains.prompt("code", rng, held_out_corpus, 1)
  with pytest.raises(ValueError, match="num_tokens must be large enough"):
    domains.prompt("long_context", rng, held_out_corpus, 40)
  with pytest.raises(ValueError, match="kind must be one of"):
    domains.text("code", rng, held_out_corpus, 64)


def test_docs_are_extracted_once(held_out_corpus, tmp_path):
  shutil.copytree(held_out_corpus.path, tmp_path / "copy")
  corpus = code_corpus.CodeCorpus(tmp_path / "copy", "held_out")
  count = domains.prepare_docs(corpus, num_files=6, num_processes=1)
  assert count > 500
  written = np.load(tmp_path / "copy" / "held_out" / "docs.npy")
  assert len(written) == count
  tokens = domains.text("docs", np.random.default_rng(0), corpus, 2 * count)
  assert len(tokens) == 2 * count  # goes on from the beginning
  start = corpus.tokenizer.decode(tokens[:40])
  assert "\n==" in start
  assert domains.prepare_docs(corpus, num_files=1) == count
  assert pickle.loads(pickle.dumps(corpus)).num_tokens == corpus.num_tokens
