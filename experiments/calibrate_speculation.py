# SPDX-License-Identifier: Apache-2.0
"""Fits HeteroSpec's bins and tables to a drafter, by one logging run.

Decodes prompts of every domain with the largest tree, fits the entropy
thresholds, times fixed policies, searches depth and size of every bin for every
batch size, and compares the policies on requests that were held out. Writes
the artefact of the config, WORKDIR/calibration.jsonl and WORKDIR/log.npz.

The same command goes on where an earlier one stopped.
"""

import dataclasses
import pathlib
import time

import numpy as np
import rich.table
from absl import app

from experiments import (
  flags_and_configs,
  long_context,
  long_context_config,
  speculation_setup,
)
from experiments import speculation_config as config_lib
from unisparse_jax import models, records
from unisparse_jax.data import domains
from unisparse_jax.speculative import calibration
from unisparse_jax.speculative.calibration import predictor

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
    "head_sha256": long_context_config.file_hash(head / "head.safetensors"),
  }
  workdir = records.claim_workdir(_WORKDIR.value, identity)
  flags_and_configs.start_jax(workdir)
  console = long_context.make_console()
  setup = speculation_setup.Setup(config, workdir)
  log = logged_steps(setup, workdir, console)
  writer = records.RecordWriter(workdir / "calibration.jsonl", identity)
  costs = measured_costs(setup, workdir, writer, console)
  artefact, comparison = fit(setup, log, costs)
  for row in comparison:
    writer.write(kind="replay", **row)
  console.print(_table(comparison))
  path = pathlib.Path(config.artefact)
  path.parent.mkdir(parents=True, exist_ok=True)
  calibration.save(artefact, path)
  console.print(f"Artefact: {path}", soft_wrap=True)


def logged_steps(
  setup: speculation_setup.Setup, workdir: pathlib.Path, console
) -> calibration.StepRecords:
  """Steps of the largest tree on prompts for calibration alone."""
  file = workdir / _LOG_FILE
  if file.exists():
    with np.load(file) as arrays:
      return calibration.StepRecords(**{name: arrays[name] for name in arrays})
  config, settings = setup.config, setup.config.calibration
  largest = setup.table(config.shape.max_depth, config.shape.max_nodes - 1)
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
        drafter=speculation_setup.EAGLE,
        policy=largest,
        shape=config.shape,
        tokens=tokens,
        lengths=lengths,
        keys=setup.keys("code", 1_000_000 + begin, size),
        temperature=temperature,
        new_tokens=settings.new_tokens,
        dtype=config.dtype,
        log_trees=True,
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


def _fields(log) -> dict[str, np.ndarray]:
  return {f.name: getattr(log, f.name) for f in dataclasses.fields(log)}


def measured_costs(
  setup: speculation_setup.Setup, workdir: pathlib.Path, writer, console
) -> list[calibration.StepCosts]:
  """Times of a step by batch size, from fixed policies run in full."""
  config, settings = setup.config, setup.config.calibration
  file = workdir / "calibration.jsonl"
  found = records.read(file) if file.exists() else []
  done = {r["batch"]: r for r in found if r["kind"] == "costs"}
  result = []
  for batch in config.batches:
    if batch in done:
      result.append(calibration.costs.from_mapping(done[batch]["costs"]))
      continue
    count = -(-batch // len(config.domains))
    made = [
      setup.prompts(name, count=count, use="time") for name in config.domains
    ]
    # All domains in turn.
    turns = [prompt for turn in zip(*made, strict=True) for prompt in turn]
    tokens, lengths = setup.padded(turns[:batch])
    shape = config.shape_for(batch)
    common = dict(
      shape=shape,
      tokens=tokens,
      lengths=lengths,
      keys=setup.keys("code", 2_000_000, batch),
      temperature=0.0,
      new_tokens=config.new_tokens,
      dtype=config.dtype,
    )
    plain = _best(setup, drafter=None, policy=None, **common)
    plain_ms = 1e3 * plain.seconds / (config.new_tokens - 1)
    measurements = []
    sizes = shape.packed or shape.buckets
    for bucket in sizes:
      nodes = (bucket // batch if shape.packed else bucket) - 1
      for levels in (config.shape.base_depth, config.shape.max_depth):
        call = _best(
          setup,
          drafter=speculation_setup.EAGLE,
          policy=setup.table(levels, nodes),
          limit=settings.timed_steps,
          **common,
        )
        steps = int(call.log.num_steps)
        measurements.append((levels, bucket, 1e3 * call.seconds / steps))
    costs = calibration.fit_costs(
      measurements,
      batch=batch,
      buckets=sizes,
      plain_ms=plain_ms,
      packed=bool(shape.packed),
    )
    writer.write(
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


def _costs(costs) -> dict:
  return dataclasses.asdict(costs)


def _best(setup, **kwargs) -> speculation_setup.Call:
  """The faster of two calls after one that compiles."""
  calls = [setup.call(**kwargs) for _ in range(3)][1:]
  return min(calls, key=lambda call: call.seconds)


def fit(
  setup: speculation_setup.Setup,
  log: calibration.StepRecords,
  costs: list[calibration.StepCosts],
) -> tuple[calibration.Artefact, list[dict]]:
  """The artefact, and how every policy does on held-out requests."""
  config, settings = setup.config, setup.config.calibration
  shape = config.shape
  requests = np.unique(log.request)
  rng = np.random.default_rng(config.seed)
  kept_out = rng.permutation(requests)[
    : max(1, round(len(requests) * settings.held_out))
  ]
  is_out = np.isin(log.request, kept_out)
  train, test = log.take(~is_out), log.take(is_out)
  thresholds = calibration.fit_thresholds(
    train.entropy,
    train.terminal_rank,
    min_leaf=settings.min_leaf,
    criterion=settings.criterion,
  )
  depths = range(shape.base_depth, (shape.max_depth or 0) + 1)
  # A bucket is filled; smaller trees matter where rows share one.
  nodes = {0, *(bucket - 1 for bucket in shape.buckets)}
  if config.packed:
    nodes |= {n for n in (3, 7, 11, 15, 23, 31, 47) if n < shape.max_nodes}
  make = dict(depths=depths, nodes=nodes, base_depth=shape.base_depth)
  arms, test_arms = (
    calibration.Arms.of(part, **make) for part in (train, test)
  )
  rule = calibration.rule_table(
    thresholds,
    base_depth=shape.base_depth,
    base_nodes=config.fixed_nodes,
    width=shape.width,
    max_depth=shape.max_depth,
    max_nodes=shape.max_nodes - 1,
    alpha=settings.alpha or None,
    first_bin=settings.first_bin,
  )
  bins = calibration.bin_of(train.entropy, thresholds)
  test_bins = calibration.bin_of(test.entropy, thresholds)
  learned = predictor.fit(train, arms, thresholds)
  by_draft = predictor.fit(train, arms, thresholds, use_recent=False)
  tables, comparison = [rule], []
  rates, step_ms = {}, {}
  for cost in costs:
    joint = calibration.by_bin(arms, bins, cost, num_bins=calibration.NUM_BINS)
    single = calibration.fixed(arms, cost)
    for name, choice in (("joint", joint), ("fixed_best", single)):
      tables.append(
        calibration.Table(
          name=name,
          batch=cost.batch,
          depth=_repeat(choice.depth),
          nodes=_repeat(choice.nodes),
          drafts=bool(choice.rate * cost.plain_ms > 1.0),
        )
      )
    times = arms.times(cost)
    rate = learned.rate(train, arms, times)
    rates[str(cost.batch)] = rate
    picked = learned.choose(train, times, rate)
    step_ms[str(cost.batch)] = float(times[picked].mean())
    comparison += _compare(
      config,
      cost,
      test,
      test_arms,
      test_bins,
      rule,
      joint,
      single,
      learned,
      by_draft,
      arms,
      train,
      bins,
    )
  about = {
    "steps": len(log),
    "requests": len(requests),
    "held_out_requests": len(kept_out),
    "temperatures": settings.temperatures,
    "tokens_per_step_largest": float(1 + log.accept_len.mean()),
    "terminal_rank_top_quarter": float(
      np.mean(log.terminal_rank <= log.max_nodes / 4)
    ),
    "bin_share": np.bincount(bins, minlength=8) / len(bins),
    "predictor": {
      "weights": learned.weights,
      "prior": learned.prior,
      "keep": learned.keep,
      "arms": arms.arms,
      "rates": rates,
      "step_ms": step_ms,
    },
  }
  artefact = calibration.Artefact(
    drafter_hash=setup.drafter_hash,
    thresholds=tuple(float(t) for t in thresholds),
    base_depth=shape.base_depth,
    width=shape.width,
    path_choice="cumulative",
    tables=tuple(tables),
    costs=tuple(costs),
    about=about,
  )
  return artefact, comparison


def _repeat(values: np.ndarray) -> tuple[int, ...]:
  return tuple(int(v) for v in np.resize(values, calibration.NUM_BINS))


def _compare(
  config,
  cost,
  test,
  arms,
  bins,
  rule,
  joint,
  single,
  learned,
  by_draft,
  train_arms,
  train,
  train_bins,
) -> list[dict]:
  """Rows of the replay's table: every policy, on requests not fitted to."""
  times = arms.times(cost)
  index = {arm: i for i, arm in enumerate(arms.arms)}
  extra = calibration.Arms.of(
    test,
    depths=sorted({*rule.depth, config.fixed_depth}),
    nodes=sorted({*rule.nodes, config.fixed_nodes}),
    base_depth=arms.base_depth,
  )
  extra_index = {arm: i for i, arm in enumerate(extra.arms)}

  def table_of(depth, nodes, where):
    return np.array([where[d, n] for d, n in zip(depth, nodes, strict=True)])

  def judged(name, which, table, of_bin):
    choice = calibration.evaluate(which, of_bin, cost, table)
    return _row(name, cost, choice)

  everywhere = np.zeros_like(bins)
  rows = [
    judged(
      "fixed",
      extra,
      np.array([extra_index[config.fixed_depth, config.fixed_nodes]]),
      everywhere,
    ),
    judged(
      "fixed_best",
      arms,
      np.array([index[int(single.depth[0]), int(single.nodes[0])]]),
      everywhere,
    ),
    judged(
      "heterospec",
      extra,
      table_of(rule.depth, rule.nodes, extra_index),
      bins,
    ),
    judged("joint", arms, table_of(joint.depth, joint.nodes, index), bins),
  ]
  for name, model in (("predictive", learned), ("predictive_draft", by_draft)):
    rate = model.rate(train, train_arms, times)
    picked = model.choose(test, times, rate)
    rows.append(_alone(name, cost, arms, picked, times))
  counts = np.maximum(np.bincount(train_bins, minlength=8), 1)[:, None]
  means = (
    np.stack(
      [
        np.bincount(train_bins, weights=train_arms.tokens[:, a], minlength=8)
        for a in range(len(train_arms.arms))
      ],
      axis=1,
    )
    / counts
  )
  picked = predictor.bandit_choices(
    test, arms, bins, times, start=means, rate=joint.rate
  )
  rows.append(_alone("bandit", cost, arms, picked, times))
  rows.append(_row("oracle", cost, calibration.oracle(arms, cost)))
  return rows


def _alone(name, cost, arms, picked, times) -> dict:
  """A policy that chooses by step, each row as if alone in its batch."""
  tokens = np.take_along_axis(arms.tokens, picked[:, None], 1).mean()
  step_ms = times[picked].mean()
  return {
    "policy": name,
    "batch": cost.batch,
    "tokens_per_step": float(tokens),
    "step_ms": float(step_ms),
    "tokens_per_ms": float(tokens / step_ms),
    "speedup": float(tokens / step_ms * cost.plain_ms),
    "each_row_alone": cost.batch > 1,
  }


def _row(name, cost, choice) -> dict:
  return {
    "policy": name,
    "batch": cost.batch,
    "tokens_per_step": choice.tokens_per_step,
    "step_ms": choice.step_ms,
    "tokens_per_ms": choice.rate,
    "speedup": choice.rate * cost.plain_ms,
    "each_row_alone": name == "oracle" and cost.batch > 1,
  }


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
