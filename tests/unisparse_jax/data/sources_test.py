# SPDX-License-Identifier: Apache-2.0
"""Which files are trained on, held out or left aside."""

import pytest

from unisparse_jax.data import sources


def _write(folder, name, text):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def _held_out_text(name="textwrap.py"):
  for source in sources.find_sources():
    if source.name == name:
      return sources.read_source(source.path)
  raise AssertionError(name)


def test_held_out_set_is_large_and_fixed():
  found = sources.find_sources()
  held_out = [source for source in found if source.held_out]
  texts = [sources.read_source(source.path) for source in held_out]
  texts = [text for text in texts if text is not None]
  assert 45 <= len(texts) <= 90
  assert 1_200_000 <= sum(map(len, texts)) <= 2_100_000
  modules = {
    source.name.split("/")[0].removesuffix(".py") for source in held_out
  }
  assert modules == set(sources.HELD_OUT)
  assert found == sources.find_sources()


def test_no_name_is_in_both_splits():
  found = sources.find_sources()
  train = {source.name for source in found if not source.held_out}
  for module in sources.HELD_OUT:
    for name in (f"{module}.py", f"{module}/__init__.py"):
      assert name not in train
    assert f"test/test_{module}.py" not in train
  assert "os.py" in train
  assert not any(name.startswith("encodings/") for name in train)


@pytest.mark.parametrize(
  ("name", "left_out"),
  [
    ("heapq.py", True),
    ("pkg/_vendor/argparse.py", True),
    ("json/decoder.py", True),
    ("test/test_json/test_dump.py", True),
    ("test/test_tarfile.py", True),
    ("test/test_dataclasses_extra.py", True),
    ("test/test_copyreg.py", False),
    ("os.py", False),
    ("pkg/heapq2.py", False),
    ("copyreg.py", False),
  ],
)
def test_names_left_out(name, left_out):
  assert sources.is_named_like_held_out(name) == left_out


def test_vendored_copies_are_recognised_by_content(tmp_path):
  text = _held_out_text()
  lines = text.split("\n")
  _write(tmp_path, "a/wrapping.py", text)
  edited = [
    f"{line}  # ours" if i % 3 else line for i, line in enumerate(lines)
  ]
  _write(tmp_path, "b/partly.py", "\n".join(edited))
  _write(
    tmp_path, "c/own.py", "def our_function(our_argument):\n  return 1\n" * 9
  )
  found = sources.find_sources([str(tmp_path)])
  assert {"a/wrapping.py", "b/partly.py"} <= {source.name for source in found}
  texts = list(
    sources.training_texts(found[-3:] + [s for s in found if s.held_out])
  )
  assert texts == [(tmp_path / "c/own.py").read_text()]


def test_unreadable_and_useless_files_are_skipped(tmp_path):
  good = "def function_of_some_length(value):\n  return value\n" * 8
  cases = {
    "good.py": good,
    "tiny.py": "x = 1\n",
    "long_line.py": good + "x = '" + "a" * 2000 + "'\n",
    "numbers.py": "x = [\n" + "  1234, 5678, 9012,\n" * 50 + "]\n",
    "nul.py": good + "\0",
    "giant.py": good * 5000,
  }
  kept = []
  for name, text in cases.items():
    path = _write(tmp_path, name, text)
    if sources.read_source(str(path)) is not None:
      kept.append(name)
  assert kept == ["good.py"]
  (tmp_path / "latin.py").write_bytes(good.encode() + b"# \xe9\n")
  assert sources.read_source(str(tmp_path / "latin.py")) is None
  assert sources.read_source(str(tmp_path / "absent.py")) is None


def test_line_ends_are_normalised(tmp_path):
  body = "def function_of_some_length(value):\r\n  return value\r\n" * 8
  path = tmp_path / "windows.py"
  path.write_bytes(b"\xef\xbb\xbf\r\n\r\n" + body.encode() + b"\r\n\r\n")
  text = sources.read_source(str(path))
  assert text == body.replace("\r\n", "\n")


def test_skipped_folders_and_order(tmp_path):
  for name in (
    "b.py",
    "a.py",
    "z/c.py",
    "__pycache__/d.py",
    ".git/e.py",
    "x_pb2.py",
  ):
    _write(tmp_path, name, "pass\n")
  _write(tmp_path, "z/site-packages/f.py", "pass\n")
  names = [
    s.name for s in sources.find_sources([str(tmp_path)]) if not s.stdlib
  ]
  assert names == ["a.py", "b.py", "z/c.py"]


def test_extra_directory_must_exist(tmp_path):
  with pytest.raises(ValueError, match=r"extra_directories.*nowhere"):
    sources.find_sources([str(tmp_path / "nowhere")])
