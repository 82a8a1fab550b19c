# SPDX-License-Identifier: Apache-2.0
import dataclasses
import enum
import json
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from unisparse_jax import records


class Color(enum.Enum):
  RED = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  rate: float
  sizes: tuple[int, ...]


def test_record_holds_settings_environment_and_measurement(tmp_path):
  path = tmp_path / "new" / "results.jsonl"
  writer = records.RecordWriter(path, Settings(rate=0.5, sizes=(1, 2)))
  written = writer.write(latency_ms=jnp.float32(1.5), name="a")
  writer.write(latency_ms=float("nan"), name="b")
  first, second = records.read(path)
  assert first == written
  assert first["settings"] == {
    "type": "Settings",
    "rate": 0.5,
    "sizes": [1, 2],
  }
  assert first["latency_ms"] == 1.5
  assert first["platform"] == "cpu"
  assert set(first["versions"]) == {"python", "jax", "jaxlib", "flax"}
  assert first["time_utc"].endswith("+00:00")
  assert second["latency_ms"] == "nan"


def test_record_refuses_the_names_of_the_common_fields(tmp_path):
  writer = records.RecordWriter(tmp_path / "results.jsonl", {})
  with pytest.raises(ValueError, match=r"must not name \['commit'\]"):
    writer.write(commit="mine")
  assert not (tmp_path / "results.jsonl").exists()


def test_unfinished_last_line_is_ignored_then_cut_off(tmp_path):
  path = tmp_path / "results.jsonl"
  writer = records.RecordWriter(path, {})
  writer.write(value=1)
  with path.open("a") as file:
    file.write('{"value": 2, "sett')
  assert [record["value"] for record in records.read(path)] == [1]
  records.RecordWriter(path, {}).write(value=3)
  assert [record["value"] for record in records.read(path)] == [1, 3]


def test_unreadable_line_in_the_middle_is_an_error(tmp_path):
  path = tmp_path / "results.jsonl"
  path.write_text('{"value": 1}\n{"val\n{"value": 3}\n')
  with pytest.raises(ValueError, match="got line 2"):
    records.read(path)


def _git(folder, *args):
  subprocess.run(
    ["git", "-c", "user.name=t", "-c", "user.email=t@t", *args],
    cwd=folder,
    check=True,
    capture_output=True,
  )


def test_commit_and_dirty_flag(tmp_path):
  package = tmp_path / "unisparse_jax"
  package.mkdir()
  assert records.git_state(package) == (None, None)
  (package / "a.py").write_text("1")
  _git(tmp_path, "init")
  assert records.git_state(package) == (None, None)
  _git(tmp_path, "add", ".")
  _git(tmp_path, "commit", "-m", "first")
  commit, dirty = records.git_state(package)
  assert len(commit) == 40
  assert dirty is False
  (package / "a.py").write_text("2")
  assert records.git_state(package) == (commit, True)


def test_somebody_elses_repository_is_not_ours(tmp_path):
  _git(tmp_path, "init")
  (tmp_path / "a.py").write_text("1")
  _git(tmp_path, "add", ".")
  _git(tmp_path, "commit", "-m", "first")
  assert records.git_state(tmp_path) == (None, None)


def test_workdir_is_claimed_once_per_settings(tmp_path):
  workdir = tmp_path / "run"
  settings = {"train": Settings(rate=0.5, sizes=(1, 2)), "speed": {"n": 1}}
  records.claim_workdir(workdir, settings)
  (workdir / "result").write_text("kept")
  records.claim_workdir(workdir, settings)
  before = (workdir / records.RUN_FILE).read_bytes()
  changed = settings | {"train": Settings(rate=0.25, sizes=(1, 2, 3))}
  with pytest.raises(ValueError) as raised:
    records.claim_workdir(workdir, changed)
  message = str(raised.value)
  assert f"workdir={workdir}" in message
  assert "train.rate is 0.5 there and 0.25 here" in message
  assert "train.sizes.2 is absent there and 3 here" in message
  assert "speed" not in message
  assert (workdir / records.RUN_FILE).read_bytes() == before
  assert (workdir / "result").read_text() == "kept"


def test_free_settings_may_change(tmp_path):
  records.claim_workdir(tmp_path / "run", {"a": 1, "speed": {"n": 1}})
  changed = {"a": 1, "speed": {"n": 2}}
  records.claim_workdir(tmp_path / "run", changed, free=["speed.n"])
  with pytest.raises(ValueError, match=r"speed\.n is 1 there and 2 here"):
    records.claim_workdir(tmp_path / "run", changed, free=["spee"])


def test_foreign_folder_is_not_claimed(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  with pytest.raises(ValueError, match="holds other files"):
    records.claim_workdir(tmp_path, {})
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
  with pytest.raises(ValueError, match="workdir must be a folder"):
    records.claim_workdir(tmp_path / "thesis.tex", {})


def test_unreadable_run_file_names_the_workdir(tmp_path):
  (tmp_path / records.RUN_FILE).write_text('{"a"')
  with pytest.raises(ValueError, match=r"run\.json.*workdir="):
    records.claim_workdir(tmp_path, {})


def test_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "value.json"
  records.write_json(path, {"a": 1})
  with pytest.raises(RecursionError):
    loop = []
    loop.append(loop)
    records.write_json(path, loop)
  assert json.loads(path.read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_to_json_of_unusual_values():
  assert records.to_json(
    {1: np.int64(3), "b": np.ones(2), "c": Color.RED, "d": {3, 1}, "e": None}
  ) == {"1": 3, "b": [1.0, 1.0], "c": "red", "d": [1, 3], "e": None}
