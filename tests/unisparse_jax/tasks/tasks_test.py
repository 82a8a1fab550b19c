# SPDX-License-Identifier: Apache-2.0
"""The 13 tasks: form, truth of the answers, lengths, RULER's counts."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from unisparse_jax import tasks
from unisparse_jax.tasks import needles, words

_NAMES = sorted(tasks.TASKS)


def _sample(corpus, name, max_len=2048, seed=0):
  rng = np.random.default_rng(seed)
  return tasks.TASKS[name].sample(rng, corpus, corpus.tokenizer, max_len)


def _context(sample):
  """The prompt without its question."""
  return sample.prompt.rsplit("\n", 2)[0]


def test_all_thirteen():
  assert set(_NAMES) == {
    *["niah_single_1", "niah_single_2", "niah_single_3"],
    *["niah_multikey_1", "niah_multikey_2", "niah_multikey_3"],
    *["niah_multivalue", "niah_multiquery"],
    *["vt", "cwe", "fwe", "qa_1", "qa_2"],
  }
  for name, task in tasks.TASKS.items():
    assert task.name == name
    assert task.match == ("part" if name.startswith("qa") else "all")
    assert tasks.get_task(name) is task
  with pytest.raises(ValueError, match=r"task must be one of.*'niah'"):
    tasks.get_task("niah")
  with pytest.raises(TypeError):
    tasks.TASKS["new"] = None


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("max_len", [2048, 4096, 16384])
def test_length_tokens_and_targets(held_out_corpus, name, max_len):
  tokenizer = held_out_corpus.tokenizer
  for seed in range(4 if max_len < 16384 else 1):
    sample = _sample(held_out_corpus, name, max_len, seed)
    used = len(sample.prompt_tokens) + sample.max_new_tokens
    assert 0.95 * max_len <= used <= max_len
    assert sample.prompt_tokens.dtype == np.int32
    np.testing.assert_array_equal(
      sample.prompt_tokens, [tokenizer.bos_id, *tokenizer.encode(sample.prompt)]
    )
    assert sample.task == name
    for target in sample.targets:
      assert target in _context(sample)
      # The answer is not given away after the context.
      if not name.startswith("qa"):
        assert target not in sample.prompt.removeprefix(_context(sample))


@pytest.mark.parametrize("name", _NAMES)
def test_seed_decides(held_out_corpus, name):
  first = _sample(held_out_corpus, name, seed=3)
  assert first.prompt == _sample(held_out_corpus, name, seed=3).prompt
  assert first.prompt != _sample(held_out_corpus, name, seed=4).prompt


@pytest.mark.parametrize("name", _NAMES)
def test_answer_fits_the_budget_and_scores_one(train_corpus, name):
  task, tokenizer = tasks.TASKS[name], train_corpus.tokenizer
  for seed in range(20):
    rng = np.random.default_rng(seed)
    episode = task.build(rng, train_corpus, tokenizer, 2000, training=False)
    (question,) = episode.questions
    assert len(tokenizer.encode(question.answer)) <= task.max_new_tokens
    sample = _sample(train_corpus, name)
    sample = dataclasses.replace(sample, targets=question.targets)
    assert tasks.score(question.answer, sample) == 1.0
    joined = np.concatenate(
      [tokenizer.encode(question.prompt), tokenizer.encode(question.answer)]
    )
    np.testing.assert_array_equal(
      tokenizer.encode(question.prompt + question.answer), joined
    )


@pytest.mark.parametrize("name", _NAMES)
def test_too_small_names_a_length_that_works(held_out_corpus, name):
  with pytest.raises(ValueError, match=r"max_len must.*max_len=60") as error:
    _sample(held_out_corpus, name, 60)
  minimum = int(re.search(r"max_len >= (\d+)", str(error.value))[1])
  assert 60 < minimum < 1500
  _sample(held_out_corpus, name, minimum)


def test_haystack_too_short_for_questions(held_out_corpus):
  with pytest.raises(ValueError, match=r"max_len must be well below the"):
    _sample(held_out_corpus, "qa_1", 2 * held_out_corpus.num_tokens)


def test_code_wraps_round_the_end(held_out_corpus):
  max_len = held_out_corpus.num_tokens + 4096
  sample = _sample(held_out_corpus, "niah_single_2", max_len)
  assert len(sample.prompt_tokens) > 0.98 * max_len


_NEEDLE = re.compile(r"^# The special magic \w+ for (\S+) is: (\S+)$", re.M)


@pytest.mark.parametrize(
  ("name", "num_needles", "num_keys", "num_targets"),
  [
    ("niah_single_1", 1, 1, 1),
    ("niah_single_2", 1, 1, 1),
    ("niah_single_3", 1, 1, 1),
    ("niah_multikey_1", 4, 4, 1),
    ("niah_multivalue", 4, 1, 4),
    ("niah_multiquery", 4, 4, 4),
  ],
)
def test_needle_counts(
  held_out_corpus, name, num_needles, num_keys, num_targets
):
  depths = []
  for seed in range(20):
    sample = _sample(held_out_corpus, name, seed=seed)
    found = _NEEDLE.findall(_context(sample))
    assert len(found) == num_needles
    assert len({key for key, _ in found}) == num_keys
    assert len({value for _, value in found}) == num_needles
    asked = sample.metadata["asked"]
    assert len(sample.targets) == num_targets
    values = [value for key in asked for k, value in found if k == key]
    assert list(sample.targets) == values
    pattern = r"[0-9a-f-]{36}" if name == "niah_single_3" else r"\d{7}"
    assert all(re.fullmatch(pattern, target) for target in sample.targets)
    depths += sample.metadata["depths"]
  assert min(depths) < 0.2 and max(depths) > 0.8


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_needles_as_haystack(held_out_corpus, name):
  sample = _sample(held_out_corpus, name)
  lines = _context(sample).split("\n")[2:]
  found = dict(_NEEDLE.findall(_context(sample)))
  assert len(found) == len(lines) > 15
  assert (found[sample.metadata["asked"][0]],) == sample.targets


def test_noise_haystack(held_out_corpus):
  sample = _sample(held_out_corpus, "niah_single_1")
  lines = _context(sample).split("\n")[2:]
  assert collections.Counter(lines)[needles.NOISE.strip()] == len(lines) - 1


def test_chain_of_variables(held_out_corpus):
  for seed in range(10):
    sample = _sample(held_out_corpus, "vt", seed=seed)
    value = sample.metadata["value"]
    holders = []
    for name, right in re.findall(r"# VAR (\w+) = (.+)", _context(sample)):
      if right == value or right.removeprefix("VAR ") in holders:
        holders.append(name)
    assert tuple(holders) == sample.targets
    assert len(holders) == 5
    assert all(re.fullmatch(r"[A-Z]{5}", name) for name in holders)
    assert re.fullmatch(r"\d{5}", value)


@pytest.mark.parametrize(
  ("max_len", "common_count", "other_count"), [(2048, 6, 1), (8192, 30, 3)]
)
def test_common_words(held_out_corpus, max_len, common_count, other_count):
  sample = _sample(held_out_corpus, "cwe", max_len)
  items = re.findall(r" (\d+)\. (\w+)", _context(sample))
  assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
  counts = collections.Counter(word for _, word in items)
  common = {word for word, count in counts.items() if count == common_count}
  assert common == set(sample.targets)
  assert len(common) == 10
  others = {count for word, count in counts.items() if word not in common}
  assert others == {other_count}


def test_word_list_is_extended_by_pairs(held_out_corpus):
  task = tasks.TASKS["cwe"]
  rng = np.random.default_rng(0)
  tokenizer = held_out_corpus.tokenizer
  sample = task.sample(rng, held_out_corpus, tokenizer, 65536)
  counts = collections.Counter(re.findall(r"\d\. (\w+)", _context(sample)))
  assert len(counts) > len(words.WORDS)
  assert set(counts.values()) == {30, 3}


@pytest.mark.parametrize("max_len", [2048, 8192])
def test_frequent_words(held_out_corpus, max_len):
  sample = _sample(held_out_corpus, "fwe", max_len)
  body = "\n".join(_context(sample).split("\n")[2:])
  counts = collections.Counter(body.replace("#", " ").split())
  ranked = [word for word, _ in counts.most_common(5)]
  assert ranked[0] == "..."
  assert tuple(ranked[1:4]) == sample.targets
  assert all(re.fullmatch(r"[a-z]{6}", word) for word in ranked[1:])
  # Rank r has a share of r ** -2 / zeta(2), less what is cut off.
  assert counts["..."] / counts[ranked[1]] == pytest.approx(4.0, rel=0.05)
  assert counts["..."] / counts[ranked[3]] == pytest.approx(16.0, rel=0.1)
  assert 0.9 * max_len / 50 < sample.metadata["vocabulary"] <= max_len / 50


def _documents(sample):
  parts = re.split(r"^# Document \d+: (\S+)\n", _context(sample), flags=re.M)
  return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_have_one_right_answer(held_out_corpus, name):
  kinds = collections.Counter()
  for seed in range(40):
    sample = _sample(held_out_corpus, name, 4096, seed)
    question, prefix = sample.prompt.split("\n")[-2:]
    document = _documents(sample)[sample.metadata["file"]]
    (target,) = sample.targets
    kind = sample.metadata["kind"]
    kinds[kind] += 1
    assert (
      sample.metadata["file"]
      in sample.prompt.rsplit("\n", 3)[-2] + (sample.prompt.rsplit("\n", 3)[-3])
    )
    if kind in ("function", "bases") or (kind == "method" and name == "qa_1"):
      head = prefix.removeprefix("# Answer: ")
      assert re.findall(re.escape(head + target), document)
      assert len(re.findall(re.escape(head) + r"\(", document)) == 1
    elif kind == "method":
      owner, head = prefix.removeprefix("# Answer: ").split(": ")
      after = document.split(owner, 1)[1]
      assert head + target in after
      assert len(re.findall(re.escape(head) + r"\b", _context(sample))) > 1
    elif kind == "constant":
      head = prefix.removeprefix("# Answer: ")
      assert f"\n{head} {target}\n" in document
    elif kind == "next_line":
      given = question.removeprefix("#  ")
      lines = [line.strip() for line in _context(sample).split("\n")]
      assert lines.count(given) == 1
      rest = [line for line in lines[lines.index(given) + 1 :] if line]
      assert rest[0] == target
    else:
      assert kind == "default"
      assert f"={target}" in document
  expected = 3 if name == "qa_1" else 2
  assert len(kinds) >= expected, kinds


def test_documents_are_of_different_files(held_out_corpus):
  sample = _sample(held_out_corpus, "qa_2", 8192)
  headers = re.findall(r"^# Document (\d+): (\S+)$", sample.prompt, flags=re.M)
  assert [int(number) for number, _ in headers] == list(
    range(1, len(headers) + 1)
  )
  assert len({name for _, name in headers}) == len(headers) >= 5


def _scored(targets, match):
  return tasks.TaskSample(
    task="t",
    prompt="",
    prompt_tokens=np.zeros(0, np.int32),
    targets=targets,
    match=match,
    max_new_tokens=1,
    metadata={},
  )


@pytest.mark.parametrize(
  ("prediction", "targets", "match", "expected"),
  [
    (" 123, 456\n", ("123", "456"), "all", 1.0),
    (" 123\n", ("123", "456"), "all", 0.5),
    (" 123\n", ("123", "456"), "part", 1.0),
    (" 12\n", ("123", "456"), "part", 0.0),
    ("the ABcd is", ("abCD",), "all", 1.0),
    (" 999\n# and 123", ("123",), "all", 0.0),
    ("", ("123",), "all", 0.0),
  ],
)
def test_score(prediction, targets, match, expected):
  assert tasks.score(prediction, _scored(targets, match)) == expected


def test_word_lists():
  for name in ("ADJECTIVES", "NOUNS", "WORDS"):
    listed = getattr(words, name)
    assert len(set(listed)) == len(listed) >= 200
    assert all(re.fullmatch(r"[a-z]{3,8}|[a-z]{9}", word) for word in listed)
