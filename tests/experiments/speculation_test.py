# SPDX-License-Identifier: Apache-2.0
"""Head, calibration and measurement, one after the other, on a tiny model."""

import dataclasses
import itertools
import types

import numpy as np
import pytest
from flax import nnx

from configs.speculative_speedup import (
  default,
  pylib_12m,
  pylib_12m_long,
  smoke,
)
from configs.train_draft_head import default as head_default
from configs.train_draft_head import pylib_12m as head_pylib
from configs.train_draft_head import smoke as head_smoke
from experiments import (
  calibrate_speculation,
  speculative_speedup,
  train_draft_head,
)
from experiments.decoding import (
  speculation_config,
  speculation_plan,
  speculation_setup,
  speculation_summary,
  speculative_speedup_run,
)
from experiments.frame import flags_and_configs
from experiments.training import own_text_data
from unisparse_jax import data, models, records, training
from unisparse_jax.speculative import calibration, eagle_head, head_files


def run(monkeypatch, module, config, workdir):
  for name, value in (("_CONFIG", config), ("_WORKDIR", str(workdir))):
    monkeypatch.setattr(module, name, types.SimpleNamespace(value=value))
  module.main(["main"])


def make_head(model_folder, folder, seed):
  target = models.load_hf(model_folder)
  head = eagle_head.EagleHead.from_target(target, rngs=nnx.Rngs(seed))
  return head_files.save_head(head, folder)


def small(model_folder, tmp_path):
  config = smoke.get_config()
  config.target = str(model_folder)
  config.head = str(make_head(model_folder, tmp_path / "head", 0))
  config.artefact = str(tmp_path / "policy.json")
  config.corpus = str(tmp_path / "corpus")
  config.packed = ()
  config.shape = dict(width=2, base_depth=1, max_depth=2, buckets=(1, 4))
  config.combined_shape = dict(
    width=2, base_depth=1, max_depth=4, buckets=(1, 4)
  )
  config.combined_nodes = 3
  config.fixed_depth = 2
  config.fixed_nodes = 3
  config.domains = ("tables",)
  config.batches = (1,)
  config.temperatures = (0.0,)
  config.methods = ("plain", "fixed", "heterospec", "fixed_same", "combined")
  config.few = ()
  config.few_at = ()
  config.exact_prompts = 0
  config.long_prompts = ()
  config.compile_threads = 2
  config.calibration.update(
    prompts=2, batch_size=1, temperatures=(0.0,), new_tokens=24, alpha=2
  )
  return config


@pytest.mark.slow
def test_calibrates_measures_and_resumes(
  model_folder, in_process, monkeypatch, tmp_path
):
  config = small(model_folder, tmp_path)
  tokenizer = data.Tokenizer.load(model_folder / "tokenizer.json")
  data.build_cache(config.corpus, tokenizer, num_processes=1)
  run(monkeypatch, calibrate_speculation, config, tmp_path / "calibration")
  artefact = calibration.load(config.artefact)
  assert {t.name for t in artefact.tables} == {
    *("rule", "joint", "thrifty", "fixed_best"),
  }
  assert artefact.about["requests"] == 2
  found = records.read(tmp_path / "calibration" / "records.jsonl")
  policies = {r["policy"]: r for r in found if r["kind"] == "replay"}
  assert policies["oracle"]["speedup"] >= policies["joint"]["speedup"] - 1e-9

  workdir = tmp_path / "speedup"
  config.max_seconds = 0.0
  run(monkeypatch, speculative_speedup, config, workdir)
  assert not (workdir / "records.jsonl").exists()
  config.max_seconds = None
  run(monkeypatch, speculative_speedup, config, workdir)
  lines = records.read(workdir / "records.jsonl")
  assert [r["method"] for r in lines] == list(config.methods)
  assert all(r["mismatched_rows"] == 0 for r in lines)
  assert all(len(r["turn_s"]) == config.repeats for r in lines)
  assert all(len(r["turn_over_fixed"]) == config.repeats for r in lines[2:])
  by_method = {r["method"]: r for r in lines}
  assert "first_gaps" not in by_method["fixed"]
  assert by_method["plain"]["tokens_per_call"] == 1.0
  fixed = by_method["fixed"]
  assert fixed["nodes_per_call"] <= 4
  assert fixed["calls"] <= by_method["plain"]["calls"]
  assert sum(fixed["accept_histogram"]) == fixed["calls"]
  text = (workdir / "report.html").read_text()
  assert "Tokens per call" in text
  run(monkeypatch, speculative_speedup, config, workdir)
  assert len(records.read(workdir / "records.jsonl")) == len(lines)
  # One that is missing is measured again beside what it needs.
  kept = (workdir / "records.jsonl").read_text().splitlines(keepends=True)
  del kept[3]
  (workdir / "records.jsonl").write_text("".join(kept))
  run(monkeypatch, speculative_speedup, config, workdir)
  *_, again = records.read(workdir / "records.jsonl")
  assert len(kept) == len(lines) - 1
  assert again["method"] == "fixed_same" == lines[3]["method"]
  assert len(again["turn_over_plain"]) == config.repeats
  assert "turn_over_fixed" not in again
  for name in ("calls", "nodes_per_call", "accept_histogram"):
    assert again[name] == lines[3][name]

  # An artefact that lacks a policy, then one of another head.
  fewer = dataclasses.replace(
    artefact, tables=tuple(t for t in artefact.tables if t.name != "thrifty")
  )
  calibration.save(fewer, config.artefact)
  config.methods = (*config.methods, "thrifty")
  with pytest.raises(
    ValueError, match=r"^name must be a table of the artefact"
  ):
    run(monkeypatch, speculative_speedup, config, tmp_path / "lacking")
  assert not (tmp_path / "lacking" / "records.jsonl").exists()
  config.head = str(make_head(model_folder, tmp_path / "other", 1))
  with pytest.raises(ValueError, match="artefact must be fitted for this"):
    run(monkeypatch, speculative_speedup, config, tmp_path / "third")


@pytest.mark.slow
def test_trains_a_head(model_folder, in_process, monkeypatch, tmp_path):
  config = head_smoke.get_config()
  config.target = str(model_folder)
  group = dict(config.texts.groups[0])
  group |= dict(domains=("tables", "word_problems"), new_tokens=8)
  config.texts.groups = (group,)
  config.train.update(steps=2, batch_tokens=80, num_unrolled=1)
  workdir = tmp_path / "head"
  run(monkeypatch, train_draft_head, config, workdir)
  written = (workdir / "texts" / "short.npz").stat().st_mtime_ns
  target = models.load_hf(model_folder)
  head = head_files.load_head(workdir / "head", target)
  assert head.config.tap_layers == models.tap_layers(2)
  lines = training.read_metrics(workdir / "train" / "metrics.jsonl")
  assert [r["step"] for r in lines if r["kind"] == "train"] == [2]
  with pytest.raises(ValueError, match=r"train\.seed is absent there and"):
    config.train.seed = 1
    run(monkeypatch, train_draft_head, config, workdir)
  assert (workdir / "texts" / "short.npz").stat().st_mtime_ns == written


def test_the_configs_are_well_formed():
  for module in (default, pylib_12m, pylib_12m_long, smoke):
    config = speculation_config.parse(module.get_config())
    groups = speculation_plan.plan(config)
    steps = [step for group in groups for step in group]
    assert len({step.key for step in steps}) == len(steps)
    assert len({(*g[0].place, g[0].domain) for g in groups}) == len(groups)
    for group in groups:
      assert len({(*s.place, s.domain) for s in group}) == 1
      methods = [step.method for step in group]
      assert methods[0] == "plain"
      if "fixed_same" in methods:
        assert methods.index("heterospec") < methods.index("fixed_same")
    for batch in config.batches:
      assert config.shape_for(batch).max_nodes == config.shape.max_nodes
    fixed = config.fixed_shape
    assert fixed.base_depth == fixed.max_depth == config.fixed_depth
    assert len(fixed.buckets) == 1 and not fixed.packed
    assert config.fixed_nodes < fixed.max_nodes <= config.shape.max_nodes
  for module in (head_default, head_pylib, head_smoke):
    values = module.get_config()
    flags_and_configs.to_dataclass(
      training.HeadTrainConfig, values.train, name="config.train"
    )
    for group in values.texts.groups:
      flags_and_configs.to_dataclass(
        own_text_data.GroupConfig, group, name="group"
      )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ("plain", "medusa")}, "methods must be a known name"),
    ({"batches": (1, 128)}, "batches must be at most the prompts"),
    ({"fixed_nodes": 64}, "fixed_depth and fixed_nodes must fit"),
    (
      {"combined_shape": {"width": 4, "base_depth": 6, "buckets": (1, 64)}},
      "combined_shape must have the width of shape",
    ),
    ({"short_prompt": 2048}, "short_prompt must be at most prompt_len"),
    ({"packed": ((16, 8),)}, "packed must leave room for the root"),
  ],
)
def test_bad_settings_are_named(changes, message):
  config = default.get_config()
  with config.unlocked():
    config.update(changes)
  with pytest.raises(ValueError, match=message):
    speculation_config.parse(config)


def test_speed_ups_are_per_domain():
  base = dict(
    kind="speed", batch=1, temperature=0.0, rows=1, calls=10, written=10,
    mismatched_rows=0, nodes_per_token=1.0, tokens_per_call=1.0,
    nodes_per_call=1.0,
  )  # fmt: skip
  made = [
    base | dict(method=m, domain=d, tokens_per_s=s)
    for m, d, s in (
      ("plain", "code", 100.0), ("plain", "docs", 200.0),
      ("fixed", "code", 300.0), ("fixed", "docs", 200.0),
      ("heterospec", "code", 330.0), ("heterospec", "docs", 210.0),
    )
  ]  # fmt: skip
  rows = speculation_summary.summarise(made)
  mean = {r["method"]: r for r in rows if r["domain"] == "mean"}
  assert mean["fixed"]["speedup"] == pytest.approx(2.0)
  assert mean["fixed"]["least_speedup"] == pytest.approx(1.0)
  assert mean["heterospec"]["over_fixed"] == pytest.approx(0.075)
  assert np.isclose(mean["heterospec"]["tokens_per_s"], 270.0)


def test_ratios_are_taken_turn_by_turn():
  base = dict(
    kind="speed", batch=1, temperature=0.0, rows=1, calls=10, written=10,
    mismatched_rows=0, nodes_per_token=1.0, tokens_per_call=1.0,
    nodes_per_call=1.0, tokens_per_s=1.0,
  )  # fmt: skip
  made = []
  for domain, turns in (("code", [1.1, 1.0, 1.3]), ("docs", [0.9, 1.0, 0.8])):
    made += [
      base | dict(method="plain", domain=domain),
      base | dict(method="fixed", domain=domain, turn_over_plain=[2.0, 9.0, 3]),
      base
      | dict(
        method="heterospec",
        domain=domain,
        turn_over_plain=[4.0, 5.0, 1.0],
        turn_over_fixed=turns,
      ),
    ]
  # A method that was measured later has no turn beside the fixed tree.
  made.append(
    base | dict(method="joint", domain="docs", turn_over_plain=[6.0, 6.0, 1.0])
  )
  rows = speculation_summary.summarise(made)
  by = {(r["domain"], r["method"]): r for r in rows}
  assert by["code", "heterospec"]["over_fixed"] == pytest.approx(0.1)
  error = np.std([1.1, 1.0, 1.3], ddof=1) / np.sqrt(3)
  assert by["code", "heterospec"]["over_fixed_error"] == pytest.approx(error)
  mean = by["mean", "heterospec"]
  assert mean["speedup"] == 4.0 and by["mean", "fixed"]["speedup"] == 3.0
  assert mean["over_fixed"] == pytest.approx((0.1 - 0.1) / 2, abs=1e-9)
  other = np.std([0.9, 1.0, 0.8], ddof=1) / np.sqrt(3)
  assert mean["over_fixed_error"] == pytest.approx(np.hypot(error, other) / 2)
  assert by["docs", "joint"]["over_fixed"] == pytest.approx(6.0 / 3.0 - 1.0)
  assert "over_fixed_error" not in by["docs", "joint"]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_no_method_always_follows_the_same_one(count):
  orders = [
    speculation_plan.turn_order("abcdefgh"[:count], t) for t in range(9)
  ]
  for place in range(count):
    assert len({order[place] for order in orders[:count]}) == count
  pairs = [pair for o in orders[:count] for pair in itertools.pairwise(o)]
  if count % 2 == 0:
    assert len(set(pairs)) == len(pairs) == count * (count - 1)
  for method in "abcdefgh"[:count]:
    before = {a for a, b in pairs if b == method}
    assert len(before) >= min(2, count - 1)


def measured_in_turns(config, tmp_path, monkeypatch, kind, methods):
  """Values of a group whose calls take what a drifting machine would take."""
  measurer = speculative_speedup_run.Measurer(config, tmp_path)
  called, texts = [], []

  def call(*, method, tokens, reference=None, **_):
    called.append(method)
    texts.append(reference)
    return speculation_setup.Call(
      # In bfloat16, near a tie.
      tokens=tokens[:, :4] + np.int32(method == "fixed"),
      seconds={"plain": 6.0, "fixed": 3.0}.get(method, 2.0)
      * len(called) ** 0.1,
      prefill_seconds=1.0,
      log=None,
    )

  def arguments(step, expected, lengths, nodes=None):
    assert (nodes is not None) == (step.method == "fixed_same")
    return {"method": step.method}

  setup = types.SimpleNamespace(
    call=call,
    prompts=lambda domain, *, count, use, size: [np.arange(8)] * count,
    padded=lambda prompts, size: (np.stack(prompts), np.full(len(prompts), 8)),
    keys=lambda domain, first, count: None,
  )
  monkeypatch.setattr(measurer, "_setup", setup)
  monkeypatch.setattr(measurer, "_method", arguments)
  monkeypatch.setattr(measurer, "_gaps", lambda *_: [0.0])
  group = [
    speculation_plan.Step(
      kind=kind, method=m, domain="tables", batch=1, temperature=0.0
    )
    for m in methods
  ]
  return measurer.measure(group), called, texts


def test_methods_are_timed_in_turns(model_folder, tmp_path, monkeypatch):
  settings = small(model_folder, tmp_path)
  settings.methods = ("plain",)  # No artefact is read.
  settings.repeats, settings.batch_1_prompts, settings.exact_prompts = 3, 2, 2
  config = speculation_config.parse(settings)
  given = config, tmp_path, monkeypatch
  methods = ["plain", "fixed", "heterospec"]
  values, called, texts = measured_in_turns(*given, "speed", methods)
  # Two batches of prompts: once each, then three turns.
  assert called[:6] == [m for m in methods for _ in range(2)]
  for first in range(6, len(called), 3):
    assert sorted(called[first : first + 3]) == sorted(methods)
  assert len(called) == 6 + 3 * 2 * 3
  # At first what each writes of its own; then all on plain decoding's text.
  assert all(text is None for text in texts[:6])
  for method, text in zip(called[6:], texts[6:], strict=True):
    assert (text is None) == (method == "plain")
    assert text is None or text.tolist() == [[0, 1, 2, 3]]
  assert [v["mismatched_rows"] for v in values] == [0, 2, 0]
  assert ["own_tokens_per_call" in v for v in values] == [False, True, True]
  plain, fixed, adaptive = values
  assert "turn_over_plain" not in plain and "turn_over_fixed" not in fixed
  for name, value, true in (
    ("turn_over_plain", fixed, 2.0),
    ("turn_over_plain", adaptive, 3.0),
    ("turn_over_fixed", adaptive, 1.5),
  ):
    np.testing.assert_allclose(value[name], true, rtol=0.03)
  assert len(fixed["turn_s"]) == 3
  assert fixed["decode_s"] == np.median(fixed["turn_s"]) > fixed["turn_s"][0]
  assert fixed["tokens_per_s"] == fixed["written"] / fixed["decode_s"]
  assert fixed["latency_s"] == pytest.approx(fixed["decode_s"] / 2 + 1.0)

  # Alone, it needs plain decoding's times and HeteroSpec's nodes.
  values, called, _ = measured_in_turns(*given, "speed", ["fixed_same"])
  assert len(values) == 1
  assert [called.count(m) for m in ("plain", "heterospec", "fixed_same")] == [
    *(8, 4, 8)
  ]
  settings.same_text = False
  given = speculation_config.parse(settings), *given[1:]
  _, _, texts = measured_in_turns(*given, "speed", methods)
  assert all(text is None for text in texts)
  settings.same_text = True
  given = speculation_config.parse(settings), *given[1:]
  values, called, texts = measured_in_turns(*given, "exact", ["plain", "fixed"])
  assert called == ["plain"] * 2 + ["fixed"] * 2
  assert all(text is None for text in texts)
  assert [v["mismatched_rows"] for v in values] == [0, 2]
  assert not any({"tokens_per_s", "own_tokens_per_call"} & {*v} for v in values)


def test_gaps_are_those_of_the_rows_that_differ(model_folder, tmp_path):
  config = small(model_folder, tmp_path)
  config.methods = ("plain",)
  measurer = speculative_speedup_run.Measurer(
    speculation_config.parse(config), tmp_path
  )
  prompt = np.arange(3, 11, dtype=np.int32)[None]
  wanted = np.full((1, 4), 7, np.int32)
  found = wanted.copy()
  found[0, 2] = 9
  call = types.SimpleNamespace(tokens=found)
  gaps = measurer._gaps(
    [call, types.SimpleNamespace(tokens=wanted)],
    [wanted, wanted],
    [dict(tokens=prompt, lengths=np.array([8], np.int32), dtype="float32")] * 2,
  )
  model = models.load_hf(model_folder)
  known = np.concatenate([prompt[0], [7, 7]])[None]
  logits = model(np.asarray(known))[0][0, -1]
  assert gaps == [pytest.approx(abs(float(logits[7] - logits[9])), abs=1e-4)]
