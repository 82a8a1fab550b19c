# SPDX-License-Identifier: Apache-2.0
"""Rows: determinism, contents, weights, settings."""

import dataclasses
import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from unisparse_jax import tasks
from unisparse_jax.data import domains, training_rows
from unisparse_jax.tasks import line_tokens

_NONE = dict.fromkeys(training_rows.Mixture().weights(), 0.0)


def _only(name, **settings):
  return training_rows.Mixture(**(_NONE | {name: 1.0} | settings))


def _rows(corpus, seq_len=1024, seed=0, **settings):
  return training_rows.TrainingRows(corpus, seed, seq_len, **settings)


def _digest(rows, indices):
  parts = hashlib.sha256()
  for index in indices:
    row = rows[index]
    parts.update(row["tokens"].tobytes() + row["loss_weights"].tobytes())
  return parts.hexdigest()


@pytest.mark.parametrize("seq_len", [64, 300, 2048, 8192])
def test_shapes_and_values(train_corpus, seq_len):
  rows = _rows(train_corpus, seq_len)
  for index in range(6):
    row = rows[index]
    assert row["tokens"].shape == row["loss_weights"].shape == (seq_len + 1,)
    assert row["tokens"].dtype == np.int32
    assert row["loss_weights"].dtype == np.float32
    assert row["tokens"].min() >= 0
    assert row["tokens"].max() < train_corpus.tokenizer.vocab_size
    assert row["tokens"][0] == train_corpus.tokenizer.bos_id
    assert set(np.unique(row["loss_weights"])) <= {
      np.float32(w)
      for w in (
        0.0,
        line_tokens.RANDOM_WEIGHT,
        line_tokens.CODE_WEIGHT,
        line_tokens.ANSWER_WEIGHT,
      )
    }
    is_bos = row["tokens"] == train_corpus.tokenizer.bos_id
    np.testing.assert_array_equal(is_bos, row["loss_weights"] == 0.0)


def test_random_access_in_any_order(train_corpus):
  forward = _digest(_rows(train_corpus), range(8))
  rows = _rows(train_corpus)
  for index in (7, 3, 100, 5):
    rows[index]
  assert _digest(rows, range(8)) == forward
  assert _digest(pickle.loads(pickle.dumps(rows)), range(8)) == forward
  assert _digest(_rows(train_corpus, seed=1), range(8)) != forward
  assert _digest(rows, range(1, 9)) != forward


def test_another_process_gives_the_same_rows(train_corpus, cache):
  code = (
    "import hashlib, sys\n"
    "from unisparse_jax import data\n"
    "rows = data.TrainingRows(data.CodeCorpus(sys.argv[1]), 3, 1024)\n"
    "digest = hashlib.sha256()\n"
    "for i in range(24):\n"
    "  digest.update(rows[i]['tokens'].tobytes())\n"
    "  digest.update(rows[i]['loss_weights'].tobytes())\n"
    "assert 'jax' not in sys.modules\n"
    "print(digest.hexdigest())\n"
  )
  here = _digest(_rows(train_corpus, seed=3), range(24))
  for hash_seed in ("0", "1"):
    result = subprocess.run(
      [sys.executable, "-c", code, str(cache)],
      capture_output=True,
      text=True,
      check=True,
      env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
    )
    assert result.stdout.strip() == here


def test_plain_code_is_text_of_the_corpus(train_corpus):
  rows = _rows(train_corpus, mixture=_only("code"))
  tokenizer = train_corpus.tokenizer
  texts = [train_corpus.file_text(i) for i in range(train_corpus.num_files)]
  for index in range(5):
    tokens = rows[index]["tokens"]
    pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id))[1:]
    for piece in pieces:
      text = tokenizer.decode(piece)
      assert any(text in whole for whole in texts), text[:200]
      if tokenizer.eos_id in piece:
        assert any(whole.endswith(text) for whole in texts)


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_answers_and_only_answers_weigh_ten(train_corpus, name):
  rows = _rows(train_corpus, mixture=_only(name, full_row=1.0))
  tokenizer = train_corpus.tokenizer
  for index in range(3):
    row = rows[index]
    heavy = row["loss_weights"] == line_tokens.ANSWER_WEIGHT
    edges = np.flatnonzero(np.diff(heavy.astype(int)))
    assert len(edges) >= 2
    for start, stop in zip(edges[::2] + 1, edges[1::2] + 1, strict=True):
      answer = tokenizer.decode(row["tokens"][start:stop])
      before = tokenizer.decode(row["tokens"][:start])
      assert answer.endswith("\n") and answer.count("\n") == 1
      assert answer[0] in " (="
      assert before.rsplit("\n", 1)[-1].startswith("# ")


def test_first_question_looks_like_evaluation(train_corpus):
  for name, task in tasks.TASKS.items():
    rng = np.random.default_rng(5)
    tokens, _ = task.document(rng, train_corpus, train_corpus.tokenizer, 2048)
    text = train_corpus.tokenizer.decode(tokens)
    sample = task.sample(rng, train_corpus, train_corpus.tokenizer, 2048)
    instruction, *_, question, _ = sample.prompt.split("\n")
    if name.startswith("qa"):  # the kinds of question vary
      assert instruction in text
      assert "\n# Answer: " in text
    else:
      # "# What is the", "# Find all variables", ...
      assert "\n" + " ".join(question.split()[:3]) in text, name


def test_documents_never_overrun(train_corpus):
  rng = np.random.default_rng(0)
  for name, task in tasks.TASKS.items():
    made = 0
    for max_len in (40, 120, 256, 300, 511, 777, 1024):
      for _ in range(4):
        document = task.document(
          rng, train_corpus, train_corpus.tokenizer, max_len
        )
        if document is not None:
          made += 1
          assert len(document[0]) == len(document[1]) <= max_len, name
    assert made >= 12, name


def test_shares_follow_the_mixture(train_corpus):
  mixture = training_rows.Mixture(**(_NONE | {"code": 1.0, "vt": 1.0}))
  rows = _rows(train_corpus, seq_len=2048, mixture=mixture)
  answers = code = 0
  for index in range(40):
    weights = rows[index]["loss_weights"]
    answers += np.sum(weights == line_tokens.ANSWER_WEIGHT) > 0
    code += np.mean(weights == line_tokens.CODE_WEIGHT)
  assert 15 <= answers <= 39
  assert 0.35 <= code / 40 <= 0.75


def test_answer_weight(train_corpus):
  heavy = _rows(train_corpus, mixture=_only("vt"))[0]
  light = _rows(train_corpus, mixture=_only("vt", answer_weight=3.0))[0]
  np.testing.assert_array_equal(heavy["tokens"], light["tokens"])
  answers = heavy["loss_weights"] == line_tokens.ANSWER_WEIGHT
  assert answers.any()
  np.testing.assert_array_equal(light["loss_weights"][answers], 3.0)
  np.testing.assert_array_equal(
    light["loss_weights"][~answers], heavy["loss_weights"][~answers]
  )


def test_stdlib_share(train_corpus, monkeypatch):
  monkeypatch.setattr(train_corpus, "num_stdlib_files", 1)
  text = train_corpus.file_text(0)
  rows = _rows(
    train_corpus, 64, mixture=_only("code", stdlib=1.0, full_row=1.0)
  )
  for index in range(5):
    tokens = rows[index]["tokens"]
    first = tokens[: np.argmax(tokens == train_corpus.tokenizer.eos_id) or None]
    assert train_corpus.tokenizer.decode(first) in text


def test_mixture_is_hashable_and_complete():
  mixture = training_rows.Mixture()
  assert hash(mixture) == hash(training_rows.Mixture())
  names = {field.name for field in dataclasses.fields(mixture)}
  assert names == {
    "code",
    *tasks.TASKS,
    *domains.TEXTS,
    "full_row",
    "stdlib",
    "answer_weight",
  }
  weights = mixture.weights()
  assert 0.25 < weights["code"] / sum(weights.values()) < 0.4


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"vt": -1.0}, "vt must be"),
    ({"cwe": float("nan")}, "cwe must be"),
    ({"code": float("inf")}, "code must be"),
    ({"full_row": 1.5}, "full_row must be"),
    ({"answer_weight": -0.5}, "answer_weight must be"),
    ({"stdlib": float("nan")}, "stdlib must be"),
    (_NONE, "must not all be 0"),
  ],
)
def test_bad_mixture(settings, message):
  with pytest.raises(ValueError, match=message):
    training_rows.Mixture(**settings)


def test_bad_settings(train_corpus):
  with pytest.raises(ValueError, match=r"seed must.*seed=-1"):
    training_rows.TrainingRows(train_corpus, -1, 128)
  with pytest.raises(ValueError, match=r"seq_len must.*seq_len=8"):
    training_rows.TrainingRows(train_corpus, 0, 8)
  with pytest.raises(ValueError, match=r"num_rows must.*num_rows=0"):
    training_rows.TrainingRows(train_corpus, 0, 128, num_rows=0)
  rows = _rows(train_corpus, num_rows=3)
  assert len(rows) == 3
  with pytest.raises(IndexError, match="index=3"):
    rows[3]
