# SPDX-License-Identifier: Apache-2.0
"""Bins, tables and the predictor from logged steps, and how well they do."""

import numpy as np

from experiments.decoding import speculation_setup
from unisparse_jax.speculative import calibration
from unisparse_jax.speculative.calibration import predictor

# Numbers of draft nodes that `thrifty` chooses from at the depths of `joint`.
# On the steps that it is fitted to it must keep this share of that table's
# tokens, and bring so many more than the fixed tree where that table does.
_SIZES = (3, 7, 11, 15, 19, 23, 27, 31, 39, 47, 55, 63)
_KEPT, _MORE = 0.99, 1.01


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
  # A depth inside a block costs as much as its end.
  depths = sorted(
    {
      *range(shape.base_depth, shape.max_depth, shape.level_block),
      shape.max_depth,
    }
  )
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
  sized = {
    part: calibration.Arms.of(
      part_log,
      depths=sorted({*depths, config.fixed_depth}),
      nodes=sorted({*_SIZES, config.fixed_nodes} & {*range(shape.max_nodes)}),
      base_depth=shape.base_depth,
    )
    for part, part_log in (("train", train), ("test", test))
  }
  like = sized["train"].arms.index((config.fixed_depth, config.fixed_nodes))
  fixed_tokens = float(sized["train"].tokens[:, like].mean())
  tables, comparison = [rule], []
  rates = {}
  for cost in costs:
    own = arms.within(cost)
    joint = calibration.by_bin(own, bins, cost, num_bins=calibration.NUM_BINS)
    single = calibration.fixed(own, cost)
    thrifty = calibration.fewest_nodes(
      sized["train"].within(cost),
      bins,
      cost,
      num_bins=calibration.NUM_BINS,
      least_tokens=max(_KEPT * joint.tokens_per_step, _MORE * fixed_tokens),
      depth=joint.depth,
    )
    for name, choice in (
      ("joint", joint),
      ("thrifty", thrifty),
      ("fixed_best", single),
    ):
      tables.append(
        calibration.Table(
          name=name,
          batch=cost.batch,
          depth=_repeat(choice.depth),
          nodes=_repeat(choice.nodes),
          drafts=bool(choice.rate * cost.plain_ms > 1.0),
        )
      )
    of_batch = learned.within(arms, cost)
    rates[str(cost.batch)] = of_batch.rate(train, own, own.times(cost))
    comparison.append(
      _of_table("thrifty", sized["test"].within(cost), cost, test_bins, thrifty)
    )
    comparison += _compare(
      config,
      cost,
      test,
      test_arms.within(cost),
      test_bins,
      rule,
      joint,
      single,
      of_batch,
      by_draft.within(arms, cost),
      own,
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


def _of_table(name, arms, cost, bins, choice) -> dict:
  """A row of the replay's table for a choice by bin, on other steps."""
  index = {arm: i for i, arm in enumerate(arms.arms)}
  table = np.array(
    [index[d, n] for d, n in zip(choice.depth, choice.nodes, strict=True)]
  )
  return _row(name, cost, calibration.evaluate(arms, bins, cost, table))


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
  ).within(cost)
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
