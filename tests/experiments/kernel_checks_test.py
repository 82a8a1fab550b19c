# SPDX-License-Identifier: Apache-2.0
import signal
import types

import jax
import pytest
from absl import app

from experiments import kernel_checks
from experiments.kernels import kernel_cases
from unisparse_jax import records


@pytest.fixture
def run_main(monkeypatch, tmp_path):
  """Runs main with a `compute-sanitizer` that finds what the test says."""

  def run(script):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    holder = types.SimpleNamespace(value=str(tmp_path / "out"))
    monkeypatch.setattr(kernel_checks, "_WORKDIR", holder)
    with pytest.raises(SystemExit) as ended:
      kernel_checks.main(["kernel_checks"])
    return ended.value.code, records.read(
      tmp_path / "out" / "kernel_checks.jsonl"
    )

  return run


def test_a_finding_is_recorded_and_ends_with_one(run_main, tmp_path):
  # $2: the tool; its last argument: the case. Allocations are apart.
  status, found = run_main(
    'test "$XLA_PYTHON_CLIENT_ALLOCATOR" = platform || exit 3\n'
    'echo "========= ERROR SUMMARY: of $2"\n'
    'for last; do :; done; test "$2 $last" != "racecheck columns" '
    "|| exit 9"
  )
  assert status == 1
  exits = {(r["what"], r["case"]): r["exit"] for r in found}
  assert exits == {
    (tool, case): 9 if (tool, case) == ("racecheck", "columns") else 0
    for tool in kernel_checks.TOOLS
    for case in kernel_cases.CASES
  }
  assert {r["summary"] for r in found if r["what"] == "memcheck"} == {
    "ERROR SUMMARY: of memcheck"
  }
  printed = (tmp_path / "out" / "memcheck_sampled.txt").read_text()
  assert printed == "========= ERROR SUMMARY: of memcheck\n"


def test_a_tool_that_does_not_end_is_no_success(run_main, monkeypatch):
  monkeypatch.setattr(kernel_checks, "LIMIT_S", 0.2)
  status, found = run_main("exec sleep 60")
  assert status == 1 and {r["exit"] for r in found} == {None}


def test_what_hung_is_tried_again_alone(run_main, monkeypatch):
  monkeypatch.setattr(kernel_checks, "LIMIT_S", 2.0)
  status, found = run_main(
    'for last; do :; done; test "$2 $last" = "racecheck columns" || exit 0\n'
    'test -e "$0.seen" || { touch "$0.seen"; exec sleep 60; }'
  )
  assert status == 0
  assert [r["exit"] for r in found if r["exit"] != 0] == [None]
  assert found[-1]["case"] == "columns" and found[-1]["exit"] == 0


def test_what_died_of_a_signal_is_tried_again_alone(run_main):
  status, found = run_main(
    'for last; do :; done; test "$2 $last" = "memcheck sampled" || exit 0\n'
    'test -e "$0.seen" || { touch "$0.seen"; kill -SEGV $$; }'
  )
  assert status == 0
  assert [r["exit"] for r in found if r["exit"] != 0] == [-signal.SIGSEGV]
  assert found[-1]["case"] == "sampled" and found[-1]["exit"] == 0
  assert len(found) == len(kernel_checks.TOOLS) * len(kernel_cases.CASES) + 1


def test_what_dies_of_a_signal_twice_is_no_success(run_main):
  status, found = run_main("kill -SEGV $$")
  assert status == 1 and {r["exit"] for r in found} == {-signal.SIGSEGV}
  tries = len(kernel_checks.TOOLS) * len(kernel_cases.CASES)
  assert len(found) == 2 * tries  # once more and no oftener


def test_a_missing_tool_is_named(monkeypatch):
  monkeypatch.setattr(kernel_checks.shutil, "which", lambda name: None)
  with pytest.raises(app.UsageError, match="compute-sanitizer must be found"):
    kernel_checks.main(["kernel_checks"])


def test_an_unknown_case_is_named():
  with pytest.raises(ValueError, match=r"case must be.*'forward_128'"):
    kernel_cases.main("forward")


@pytest.mark.parametrize("name", ["backward_64", "columns", "sampled"])
def test_cases_lower_for_cuda(name):
  fn, arrays = kernel_cases.CASES[name]()
  traced = jax.jit(fn).trace(*arrays)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  kernels = {"backward_64": 3, "columns": 1, "sampled": 2}
  assert text.count("@mosaic_gpu") == kernels[name]
