# SPDX-License-Identifier: Apache-2.0
"""Runs each Hopper kernel under NVIDIA's compute-sanitizer, on one card.

python -m experiments.kernel_checks --workdir=out/kernel_checks

memcheck and racecheck on every case of `experiments.kernels.kernel_cases`, each
in a process of its own, six at once: a minute or two. Writes a JSON line for
each to WORKDIR/kernel_checks.jsonl (exit status 0: clean, 9: findings, null:
stopped) and what the tool printed to WORKDIR/TOOL_CASE.txt; ends with 1 unless
all are clean.
"""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from absl import app

from experiments.frame import flags_and_configs
from experiments.kernels import kernel_cases
from unisparse_jax import records

TOOLS = ("memcheck", "racecheck")
FINDINGS = 9  # exit status that the tools are asked for
LIMIT_S = 300.0
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
  try:
    done = subprocess.run(
      [
        *("compute-sanitizer", "--tool", tool),
        *("--error-exitcode", str(FINDINGS), "--print-limit", "20"),
        *(sys.executable, "-m", "experiments.kernels.kernel_cases", case),
      ],
      env=os.environ | _ENVIRONMENT,
      cwd=pathlib.Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      timeout=LIMIT_S,
    )
    printed, status = done.stdout, done.returncode
  except subprocess.TimeoutExpired as expired:
    printed, status = expired.stdout or b"", None
  output = printed.decode(errors="replace")
  (workdir / f"{tool}_{case}.txt").write_text(output, encoding="utf-8")
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
  clean = True
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    jobs = [
      pool.submit(sanitize, tool, case, workdir)
      for tool in TOOLS
      for case in kernel_cases.CASES
    ]
    for job in concurrent.futures.as_completed(jobs):
      found = writer.write(**job.result())
      clean &= found["exit"] == 0
      print(*(found[key] for key in ("what", "case", "exit", "summary")))
  sys.exit(0 if clean else 1)


if __name__ == "__main__":
  app.run(main)
