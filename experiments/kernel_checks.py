# SPDX-License-Identifier: Apache-2.0
"""Runs each Hopper kernel under NVIDIA's compute-sanitizer, on one card.

python -m experiments.kernel_checks --workdir=out/kernel_checks

memcheck and racecheck on every case of `experiments.kernels.kernel_cases`, each
in a process of its own, six at once: a minute or two. What has not ended in
time is stopped and, like a tool that died of a signal, tried once more, alone.
Writes a JSON line for each try to WORKDIR/kernel_checks.jsonl (exit status 0:
clean, 9: findings, null: stopped, below 0: died of that signal) and what the
tool printed to WORKDIR/TOOL_CASE.txt; ends with 1 unless all are clean.
"""

import concurrent.futures
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

from absl import app

from experiments.frame import flags_and_configs
from experiments.kernels import kernel_cases
from unisparse_jax import records

TOOLS = ("memcheck", "racecheck")
FINDINGS = 9  # exit status that the tools are asked for
LIMIT_S = 120.0
_AT_ONCE = 6
# Each array in an allocation of its own, so that its bounds are seen.
_ENVIRONMENT = {
  "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
  "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
}

_WORKDIR = flags_and_configs.define_workdir()


def sanitize(tool: str, case: str, workdir: pathlib.Path) -> dict[str, Any]:
  """The tool's exit status on a case and the summary that it printed."""
  path = workdir / f"{tool}_{case}.txt"
  with path.open("wb") as printed:
    running = subprocess.Popen(
      [
        *("compute-sanitizer", "--tool", tool),
        *("--error-exitcode", str(FINDINGS), "--print-limit", "20"),
        *(sys.executable, "-m", "experiments.kernels.kernel_cases", case),
      ],
      env=os.environ | _ENVIRONMENT,
      cwd=pathlib.Path(__file__).parents[1],
      stdout=printed,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    try:
      status = running.wait(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
      os.killpg(running.pid, signal.SIGKILL)  # The watched program as well.
      running.wait()
      status = None
  output = path.read_text(encoding="utf-8", errors="replace")
  summary = [x for x in output.splitlines() if "SUMMARY" in x]
  return {
    "what": tool,
    "case": case,
    "exit": status,
    "summary": summary[-1].strip("= ") if summary else "",
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  if shutil.which("compute-sanitizer") is None:
    raise app.UsageError("compute-sanitizer must be found; it comes with CUDA")
  workdir = pathlib.Path(_WORKDIR.value)
  writer = records.RecordWriter(workdir / "kernel_checks.jsonl", {})

  def check(wanted, at_once):
    """The (tool, case) that were stopped, and whether the others are clean."""
    stopped, clean = [], True
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
      jobs = [pool.submit(sanitize, *pair, workdir) for pair in wanted]
      for job in concurrent.futures.as_completed(jobs):
        found = writer.write(**job.result())
        print(*(found[key] for key in ("what", "case", "exit", "summary")))
        # Stopped, or the tool itself died of a signal.
        if found["exit"] is None or found["exit"] < 0:
          stopped.append((found["what"], found["case"]))
        else:
          clean &= found["exit"] == 0
    return stopped, clean

  stopped, clean = check(itertools.product(TOOLS, kernel_cases.CASES), _AT_ONCE)
  # Of twelve, four were seen to hang in the compiler beside other programs, and
  # in the next run one to die of a signal. Each was clean in the other run.
  stopped, clean_alone = check(stopped, 1)
  sys.exit(0 if clean and clean_alone and not stopped else 1)


if __name__ == "__main__":
  app.run(main)
