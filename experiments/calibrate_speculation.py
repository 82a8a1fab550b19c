# SPDX-License-Identifier: Apache-2.0
"""Fits HeteroSpec's bins and tables to a drafter, by one logging run.

Decodes prompts of every domain with the largest tree, fits the entropy
thresholds, times fixed policies, searches depth and size of every bin for every
batch size, and compares the policies on requests that were held out. Writes
the artefact of the config, WORKDIR/records.jsonl and WORKDIR/log.npz.

The same command goes on where an earlier one stopped.
"""

import dataclasses
import pathlib
import time

import numpy as np
import rich.table
from absl import app

from experiments import long_context
from experiments.decoding import speculation_config as config_lib
from experiments.decoding import speculation_fit, speculation_setup
from experiments.frame import flags_and_configs, runs
from experiments.prefill import long_context_config
from unisparse_jax import models
from unisparse_jax.data import domains
from unisparse_jax.speculative import calibration, head_files

_CONFIG, _WORKDIR = flags_and_configs.define()
_LOG_FILE = "log.npz"


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = config_lib.parse(_CONFIG.value)
  folder = long_context_config.model_folder(config.target)
  config.check_model(models.load_hf_config(folder))
  head = config_lib.head_folder(config.head)
  identity = {
    "calibration": config.calibration,
    "shape": config.shape,
    "target_sha256": long_context_config.weights_hash(folder),
    "head_sha256": long_context_config.file_hash(head / head_files.WEIGHTS),
  }
  run = runs.begin(_WORKDIR.value, identity, free=["calibration.max_seconds"])
  console = long_context.make_console()
  setup = speculation_setup.Setup(config, run.workdir)
  deadline = None
  if config.calibration.max_seconds is not None:
    deadline = time.monotonic() + config.calibration.max_seconds
  warm(setup, run)
  log = logged_steps(setup, run.workdir, console)
  costs = measured_costs(setup, run, console, deadline)
  artefact, comparison = speculation_fit.fit(setup, log, costs)
  for row in comparison:
    run.writer.write(kind="replay", **row)
  console.print(_table(comparison))
  path = pathlib.Path(config.artefact)
  path.parent.mkdir(parents=True, exist_ok=True)
  calibration.save(artefact, path)
  console.print(f"Artefact: {path}", soft_wrap=True)


def warm(setup: speculation_setup.Setup, run: runs.Run):
  """Compiles what the logging and the timing lack, several at once."""
  config = setup.config
  if not config.compile_threads:
    return
  programs = []
  if not (run.workdir / _LOG_FILE).exists():
    size = config.calibration.batch_size
    tokens, lengths = setup.padded([np.zeros(2, np.int32)] * size)
    for temperature in config.calibration.temperatures:
      programs.append(
        _logged_call(setup, tokens, lengths, temperature, first=0)
      )
  done = _found_costs(run)
  table = setup.table(config.shape.base_depth, 0)
  for batch in config.batches:
    if batch not in done:
      common = _timed_call(setup, batch)
      programs += [
        {**common, "drafter": None, "policy": None},
        {**common, "drafter": speculation_setup.EAGLE, "policy": table},
      ]
  setup.warm(programs, config.compile_threads)


def logged_steps(
  setup: speculation_setup.Setup, workdir: pathlib.Path, console
) -> calibration.StepRecords:
  """Steps of the largest tree on prompts for calibration alone."""
  file = workdir / _LOG_FILE
  if file.exists():
    with np.load(file) as arrays:
      return calibration.StepRecords(**{name: arrays[name] for name in arrays})
  config, settings = setup.config, setup.config.calibration
  # Every batch holds all domains: the same number of steps for all of them.
  prompts, labels = [], []
  for number in range(settings.prompts):
    for domain in config.domains:
      prompts.append((domain, number))
      labels.append(domains.DOMAINS.index(domain))
  made = {
    domain: setup.prompts(domain, count=settings.prompts, use="calibrate")
    for domain in config.domains
  }
  parts, first, start = [], 0, time.monotonic()
  size = settings.batch_size
  for temperature in settings.temperatures:
    for begin in range(0, len(prompts) - size + 1, size):
      rows = range(begin, begin + size)
      tokens, lengths = setup.padded(
        [made[prompts[row][0]][prompts[row][1]] for row in rows]
      )
      call = setup.call(
        **_logged_call(setup, tokens, lengths, temperature, first=begin)
      )
      parts.append(
        calibration.StepRecords.from_log(
          call.log,
          groups=[labels[row] for row in rows],
          first_request=first,
        )
      )
      first += size
  if not parts:
    raise ValueError(
      "calibration.prompts must fill a batch; got "
      f"{len(prompts)} prompts, batch_size={size}."
    )
  log = calibration.StepRecords.concatenate(parts)
  console.print(
    f"logged {len(log)} steps of {first} requests in "
    f"{time.monotonic() - start:.0f} s: {1 + log.accept_len.mean():.2f} tokens "
    f"a step with {log.max_nodes} nodes, {log.max_depth} levels"
  )
  temporary = file.with_suffix(".tmp.npz")
  np.savez_compressed(temporary, **_fields(log))
  temporary.replace(file)
  return log


def _logged_call(
  setup: speculation_setup.Setup, tokens, lengths, temperature, *, first
) -> dict:
  """Arguments of a call with the largest tree, whose trees are kept."""
  config = setup.config
  return dict(
    drafter=speculation_setup.EAGLE,
    policy=setup.table(config.shape.max_depth, config.shape.max_nodes - 1),
    shape=config.shape,
    tokens=tokens,
    lengths=lengths,
    keys=setup.keys("code", 1_000_000 + first, len(lengths)),
    temperature=temperature,
    new_tokens=config.calibration.new_tokens,
    dtype=config.dtype,
    log_trees=True,
  )


def _fields(log) -> dict[str, np.ndarray]:
  return {f.name: getattr(log, f.name) for f in dataclasses.fields(log)}


def measured_costs(
  setup: speculation_setup.Setup,
  run: runs.Run,
  console,
  deadline: float | None,
) -> list[calibration.StepCosts]:
  """Times of a step by batch size, from fixed policies run in full.

  Past the deadline the batch sizes that are left go without; the artefact then
  serves them by the next one that was measured.
  """
  config, settings = setup.config, setup.config.calibration
  done = _found_costs(run)
  result = []
  for batch in config.batches:
    if batch in done:
      result.append(done[batch])
      continue
    if result and deadline is not None and time.monotonic() > deadline:
      console.print(f"batch {batch}: not timed, max_seconds is used up")
      continue
    common = _timed_call(setup, batch)
    shape = common["shape"]
    sizes = shape.packed or shape.buckets
    both = (config.shape.base_depth, config.shape.max_depth)
    # (levels, size); the first is plain decoding.
    timed = [(0, 0), *((depth, size) for size in sizes for depth in both)]
    seconds = [[] for _ in timed]
    # In turns, of which the first half warms up: steps were seen to become 15%
    # faster within the first seconds of a process.
    for _ in range(2 * settings.timed_turns):
      for (levels, size), of_entry in zip(timed, seconds, strict=True):
        of_entry.append(_step_seconds(setup, common, levels, size))
    plain_ms, *step_ms = (
      1e3 * float(np.median(of_entry[settings.timed_turns :]))
      for of_entry in seconds
    )
    measurements = [
      (levels, size, time_ms)
      for (levels, size), time_ms in zip(timed[1:], step_ms, strict=True)
    ]
    costs = calibration.fit_costs(
      measurements,
      batch=batch,
      buckets=sizes,
      plain_ms=plain_ms,
      packed=bool(shape.packed),
    )
    run.writer.write(
      kind="costs", batch=batch, costs=_costs(costs), measured=measurements
    )
    console.print(
      f"batch {batch}: plain {plain_ms:.3f} ms, fixed {costs.fixed_ms:.3f}, a "
      f"level {costs.draft_ms:.3f}, verify "
      + ", ".join(
        f"{n}: {t:.3f}"
        for n, t in zip(costs.buckets, costs.verify_ms, strict=True)
      )
    )
    result.append(costs)
  return result


def _found_costs(run: runs.Run) -> dict[int, calibration.StepCosts]:
  """By batch size, what earlier calls measured."""
  return {
    record["batch"]: calibration.costs.from_mapping(record["costs"])
    for record in run.found()
    if record["kind"] == "costs"
  }


def _timed_call(setup: speculation_setup.Setup, batch: int) -> dict:
  """Arguments of a call of `batch` rows, all domains in turn."""
  config = setup.config
  count = -(-batch // len(config.domains))
  made = [
    setup.prompts(name, count=count, use="time") for name in config.domains
  ]
  turns = [prompt for turn in zip(*made, strict=True) for prompt in turn]
  tokens, lengths = setup.padded(turns[:batch])
  return dict(
    shape=config.shape_for(batch),
    tokens=tokens,
    lengths=lengths,
    keys=setup.keys("code", 2_000_000, batch),
    temperature=0.0,
    new_tokens=config.new_tokens,
    dtype=config.dtype,
  )


def _costs(costs) -> dict:
  return dataclasses.asdict(costs)


def _step_seconds(setup, common: dict, levels: int, size: int) -> float:
  """Of one step with a fixed tree; of plain decoding where it has no levels."""
  config = setup.config
  if not levels:
    plain = setup.call(drafter=None, policy=None, **common)
    return plain.seconds / (config.new_tokens - 1)
  rows = len(common["lengths"]) if common["shape"].packed else 1
  call = setup.call(
    drafter=speculation_setup.EAGLE,
    policy=setup.table(levels, size // rows - 1),
    limit=config.calibration.timed_steps,
    **common,
  )
  return call.seconds / int(call.log.num_steps)


def _table(rows: list[dict]) -> rich.table.Table:
  table = rich.table.Table(title="Replay on held-out requests")
  for name in ("batch", "policy", "tokens/step", "ms/step", "vs plain"):
    table.add_column(name, justify="left" if name == "policy" else "right")
  last = None
  for row in rows:
    if last not in (None, row["batch"]):
      table.add_section()
    last = row["batch"]
    table.add_row(
      str(row["batch"]),
      row["policy"] + (" (each row alone)" if row["each_row_alone"] else ""),
      f"{row['tokens_per_step']:.2f}",
      f"{row['step_ms']:.3f}",
      f"{row['speedup']:.2f}x",
    )
  return table


if __name__ == "__main__":
  flags_and_configs.run(main)
