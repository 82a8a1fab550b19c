# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import pathlib
import types

import pytest

from configs.frontier import (
  study,
  study_columns,
  study_more_prompts,
  study_quality,
  study_selections,
  study_short,
  study_smoke,
)
from configs.train_decoder import study as study_model
from experiments.prefill import (
  frontier_config,
  frontier_figures,
  frontier_search,
  long_context_run,
)
from unisparse_jax import models, records, training

SWEEPS = (
  frontier_config.Sweep(
    label="a",
    method="unisparse",
    budget="top_p",
    values=(0.5, 0.6, 0.7, 0.8, 0.9),
    measure=("answers", "next_token", "layers", "attention_time"),
  ),
  frontier_config.Sweep(
    label="b",
    method="xattention",
    budget="top_p",
    values=(0.5, 0.9),
    measure=("answers", "attention_time"),
  ),
  frontier_config.Sweep(label="o", method="oracle", measure=("layers",)),
)
CONFIG = types.SimpleNamespace(
  lengths=(64, 128),
  tasks=("vt", "fwe"),
  quality_layers=(0, 1),
  timed_layers=(1,),
  reference_measure=("answers", "prefill"),
)


def run(least, failing=()):
  """Steps in order; `least` is the sparsest top_p of each pattern that does."""
  search = frontier_search.Search(CONFIG, SWEEPS, 0.99, num_layers=2)
  steps = []
  while (step := search.next_step()) is not None:
    steps.append(step)
    assert len(steps) < 200
    if step.pattern in failing:
      search.give_up(step)
      continue
    name, _, budget = step.pattern.partition(" ")
    keeps = float(budget or 1.0) >= least.get(name, 0.0)
    search.add({**vars(step), "score": float(keeps)})
  return steps, search


def answered(steps, length):
  found = [
    s.pattern for s in steps if s.kind == "answers" and s.length == length
  ]
  return [p for p in dict.fromkeys(found) if p != "dense"]


def test_bisects_and_starts_where_the_length_before_ended():
  steps, search = run({"a": 0.6, "b": 0.9})
  expected = ["a 0.7", "a 0.6", "a 0.5", "b 0.9", "b 0.5"]
  assert answered(steps, 64) == expected
  # One below the last one's end, and it is done.
  assert answered(steps, 128) == ["a 0.6", "a 0.5", "b 0.9", "b 0.5"]
  assert search.matched(SWEEPS[0], 64) == "a 0.6"
  keys = [step.key for step in steps]
  assert len(set(keys)) == len(keys)
  compared = [s.pattern for s in steps if s.kind == "next_token"]
  assert sorted(compared) == sorted(list(SWEEPS[0].points) * 2)
  # Answers of both patterns come before any clock of the length, the matched
  # point's times before other points', and those of all lengths at the end.
  kinds = [(s.kind, s.length) for s in steps]
  assert kinds.index(("attention_time", 64)) > max(
    i for i, kind in enumerate(kinds) if kind == ("answers", 64)
  )
  timed = [s.pattern for s in steps if s.kind == "attention_time"]
  assert timed[:3] == ["dense", "a 0.6", "b 0.9"]
  assert sorted(timed[6:]) == sorted(
    ["a 0.5", "a 0.7", "a 0.8", "a 0.9", "b 0.5"] * 2
  )


def test_a_pattern_that_never_does_is_measured_at_its_fullest():
  steps, search = run({"a": 2.0, "b": 0.9})
  assert search.matched(SWEEPS[0], 64) is None
  assert answered(steps, 64)[:3] == ["a 0.7", "a 0.8", "a 0.9"]
  timed = [s.pattern for s in steps if s.kind == "attention_time"]
  assert timed[:2] == ["dense", "a 0.9"]


def test_a_failing_point_costs_the_others_nothing():
  steps, search = run({"a": 0.5, "b": 0.5}, failing=("a 0.7",))
  assert [s.pattern for s in steps].count("a 0.7") == 2  # once a length
  assert search.matched(SWEEPS[0], 64) == "a 0.5"
  assert search.matched(SWEEPS[1], 128) == "b 0.5"


def test_a_point_is_worth_what_the_worst_task_says_too():
  rows = [
    {"length": 64, "pattern": "a 0.9", "relative_score": 0.9, "total_ms": 2.0},
    {"length": 64, "pattern": "a 0.8", "relative_score": 0.8, "total_ms": 1.0},
  ]
  for row in rows:
    row |= {"select_ms": 0.5, "worst_task": 0.5, "worst_task_name": "vt"}
  line = frontier_figures.matched(rows, SWEEPS[:1], 0.99)[0]
  assert "budget" not in line
  assert (line["closest"], line["worst_task_name"]) == (0.9, "vt")
  table = frontier_figures.matched_table([line], 0.99)
  assert list(table.columns[2].cells) == ["none (0.9)"]


@pytest.mark.parametrize("module", [study, study_smoke])
def test_configs_fit_the_study_model(module, tmp_path):
  config = module.get_config(str(tmp_path))
  frontier = frontier_config.parse(config)
  assert frontier.search
  assert "ours" not in [sweep.label for sweep in frontier.sweeps]  # no file yet
  for sweep in frontier.sweeps:
    assert len(sweep.points) == len(sweep.values)
  if module is study:
    model = study_model.get_config()
    frontier.run.check_model(models.DecoderConfig(**model.model.to_dict()))


@pytest.mark.parametrize("module", [study_quality, study_short])
def test_configs_measure_all_that_they_list(module, tmp_path):
  frontier = frontier_config.parse(module.get_config(str(tmp_path)))
  model = models.DecoderConfig(**study_model.get_config().model.to_dict())
  frontier.run.check_model(model)
  assert not frontier.search
  steps = long_context_run.plan(frontier.run, model.num_layers)
  compared = {(s.pattern, s.length) for s in steps if s.kind == "next_token"}
  labels = ["dense", *(entry.label for entry in frontier.run.entries)]
  assert compared == set(itertools.product(labels, frontier.run.lengths))


@pytest.mark.parametrize(
  "module, name, more_lengths, left_out",
  [
    (study_columns, "frontier_columns_h200", (), ()),
    (study_more_prompts, "frontier_more_prompts_h200", (16_384,), ()),
    (study_selections, "frontier_selections_h200", (), ("answers",)),
  ],
)
def test_records_hold_all_that_their_config_measures(
  module, name, more_lengths, left_out
):
  config = module.get_config()
  config.lengths = (*config.lengths, *more_lengths)
  frontier = frontier_config.parse(config)
  num_layers = study_model.get_config().model.num_layers
  planned = {
    (step.kind, step.pattern, step.length, str(step.item))
    for step in long_context_run.plan(frontier.run, num_layers)
    if step.kind not in left_out
  }
  folder = pathlib.Path(__file__).parents[2] / "results"
  found = records.read(folder / f"{name}.jsonl")
  steps = [(r["kind"], r["pattern"], r["length"], r["item"]) for r in found]
  assert planned <= set(steps)
  recorded = {
    pattern["label"]: pattern
    for record in found
    for pattern in record.get("settings", {}).get("patterns", ())
  }
  entries = [entry for s in frontier.sweeps for entry in s.entries()]
  for entry in json.loads(json.dumps(entries)):  # lists for tuples
    assert recorded[entry["label"]] == entry


def test_the_study_models_stages_share_the_time_as_said():
  values = study_model.get_config().train.to_dict()
  stages = tuple(training.Stage(**s) for s in values.pop("stages"))
  config = training.TrainConfig(stages=stages, **values)
  shares = [s.steps * s.tokens_per_step / config.total_tokens for s in stages]
  assert [round(share, 2) for share in shares] == [0.35, 0.22, 0.25, 0.18]
