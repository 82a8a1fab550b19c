# SPDX-License-Identifier: Apache-2.0
"""Scanned layers, captured arrays and real masks, on a tiny model."""

import concurrent.futures
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.attention_speed import captured, captured_smoke
from configs.calibrate_answers import study as calibrate_study
from configs.calibrate_answers import study_smoke as calibrate_smoke
from configs.capture_attention import smoke as capture_smoke
from configs.capture_attention import study as capture_study
from configs.frontier import study, study_by_head, study_more_prompts
from configs.train_decoder import study as study_model
from experiments import capture_attention, frontier, long_context
from experiments.frame import flags_and_configs
from experiments.kernels import attention_speed_captured, attention_speed_config
from experiments.prefill import (
  calibrate_answers_search,
  frontier_config,
  long_context_config,
  long_context_programs,
  long_context_run,
)
from pallas_kernels import device
from unisparse_jax import attention, data, models, records

BLOCKS = dict(block_q=64, block_kv=64)
ALL = ("answers", "layers", "attention_time")  # the last of dense alone
SWEEP = dict(
  label="x", method="xattention", budget="top_p", values=(0.5,), **BLOCKS
)
SETTINGS = dict(
  seed=0,
  dtype="float32",
  lengths=(512,),
  reference_measure=("answers",),
  tasks=("niah_single_1",),
  samples=1,
  timed_layers=(1,),
  implementation="xla",
  repeats=1,
  scan_layers=True,
  compile_threads=2,
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("study")


def run_frontier(monkeypatch, folder, workdir, **changes):
  config = dict(
    model=str(folder),
    sweeps=(SWEEP | {"measure": ALL[:2]},),
    matched_share=0.99,
    search=True,
    **SETTINGS,
  )
  for name, value in (
    ("_CONFIG", config | changes),
    ("_WORKDIR", str(workdir)),
  ):
    holder = types.SimpleNamespace(value=value)
    monkeypatch.setattr(frontier, name, holder)
  # What is drawn has a test of its own.
  monkeypatch.setattr(
    frontier.long_context_report, "write", lambda *args: "no report"
  )
  frontier.main(["frontier"])


def test_scanned_measurements_are_those_of_the_decoder(
  monkeypatch, model_folder, in_process, workdir, capsys
):
  run_frontier(monkeypatch, model_folder, workdir / "scanned")
  found = records.read(workdir / "scanned" / "records.jsonl")
  assert {record["kind"] for record in found} == set(ALL)
  assert "x 0.5" in capsys.readouterr().out
  # A second call has nothing left to do, and loads no model.
  monkeypatch.setattr(long_context.MeasuredRun, "measurer", None)
  run_frontier(monkeypatch, model_folder, workdir / "scanned")
  assert records.read(workdir / "scanned" / "records.jsonl") == found

  config = long_context_config.parse(
    SETTINGS
    | dict(
      model=str(model_folder),
      scan_layers=False,
      patterns=(dict(label="x 0.5", method="xattention", top_p=0.5, **BLOCKS),),
    )
  )
  monkeypatch.undo()
  measurer = long_context_run.Measurer(
    config,
    models.load_hf(model_folder, dtype=jnp.float32),
    data.CodeCorpus(workdir / "scanned" / "corpus", "held_out"),
    workdir,
  )
  compared = 0
  for record in found:
    if record["kind"] == "layers":
      step = long_context_run.Step(
        **{key: record[key] for key in ("kind", "pattern", "length", "item")}
      )
      compared += 1
      for name, value in measurer.measure(step).items():
        assert record[name] == pytest.approx(value, abs=2e-5), name
      assert record["recall"] < 0.9
  assert compared == 2  # layers


def test_lengths_may_be_taken_one_by_one(
  monkeypatch, model_folder, in_process, workdir
):
  def take(name, *lengths):
    run_frontier(
      *(monkeypatch, model_folder, workdir / name),
      sweeps=(SWEEP | dict(measure=("layers",)),),
      **dict(tasks=(), reference_measure=(), quality_layers=(1,)),
      **dict(lengths=lengths, search=False),
    )
    found = records.read(workdir / name / "records.jsonl")
    return {r["length"]: (r["recall"], r["density"]) for r in found}

  first = take("apart", 512)
  apart = take("apart", 256)
  assert list(first) == [512]
  assert list(apart) == [512, 256]  # kept beside what the second call took
  assert take("together", 512, 256) == apart
  assert len(set(apart.values())) == 2


def test_scanned_next_tokens_are_those_of_the_decoder(
  monkeypatch, model_folder, in_process, workdir
):
  sweeps = (
    SWEEP | dict(values=(0.5, 0.8), measure=("next_token",)),
    dict(label="s", method="streaming", num_sink=64, num_local=64)
    | dict(measure=("next_token",), **BLOCKS),
  )
  run_frontier(
    *(monkeypatch, model_folder, workdir / "next_token"),
    **dict(sweeps=sweeps, tasks=(), code_rows=2, search=False),
    reference_measure=("next_token",),
  )
  found = {
    record["pattern"]: record
    for record in records.read(workdir / "next_token" / "records.jsonl")
  }
  assert list(found) == ["dense", "x 0.5", "x 0.8", "s"]
  dense = found["dense"]
  assert (dense["kl"], dense["agreement"]) == (0.0, 1.0)
  measurer = long_context_run.Measurer(
    frontier_config.parse(
      dict(model=str(model_folder), sweeps=sweeps, matched_share=0.99)
      | SETTINGS
      | dict(scan_layers=False, tasks=(), code_rows=2)
    ).run,
    models.load_hf(model_folder, dtype=jnp.float32),
    data.CodeCorpus(workdir / "next_token" / "corpus", "held_out"),
    workdir,
  )
  for label, record in found.items():
    step = long_context_run.Step(
      kind="next_token", pattern=label, length=512, item=""
    )
    values = measurer.measure(step)
    # The model has learnt nothing, so what patterns change is small: 6e-6 nats,
    # of which a dense reference that is a pattern's moves the loss by 1e-4.
    for name, value in values.items():
      close = dict(rel=1e-2, abs=1e-8) if name == "kl" else dict(abs=3e-6)
      assert record[name] == pytest.approx(value, **close), name
    assert record["dense_loss"] == dense["loss"]
    assert label == "dense" or record["kl"] > 1e-7


def test_programs_compile_without_weights(
  monkeypatch, model_folder, in_process, tmp_path, capsys
):
  shape = tmp_path / "shape"
  shape.mkdir()
  for name in ("config.json", "tokenizer.json"):
    (shape / name).write_bytes((model_folder / name).read_bytes())
  sweep = SWEEP | {"measure": ("layers",)}
  run_frontier(
    *(monkeypatch, shape, tmp_path / "compile"),
    sweeps=(sweep,),
    reference_measure=("prefill",),
    compile_only=True,
    search=False,
  )
  out = capsys.readouterr().out
  # Dense: prefill, capture, attention. The pattern, for all layers: selection,
  # dense attention with its lse, quality.
  assert "6 programs" in out


def test_every_program_is_begun_once_and_one_that_fails_costs_no_other(
  monkeypatch, model_folder, in_process, tmp_path, capsys
):
  begun = []
  submit = concurrent.futures.ThreadPoolExecutor.submit

  def count(self, fn, make):
    begun.append(make)
    return submit(self, fn, make)

  measure = long_context_run.Measurer.measure

  def refuse(self, step):
    if step.pattern == "x 0.5":
      raise NotImplementedError("not here")
    return measure(self, step)

  monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", count)
  monkeypatch.setattr(long_context_run.Measurer, "measure", refuse)
  measured = ("layers",)
  run_frontier(
    *(monkeypatch, model_folder, tmp_path / "run"),
    sweeps=(SWEEP | dict(values=(0.5, 0.8, 0.9), measure=measured),),
    **dict(reference_measure=("prefill",), tasks=(), search=False),
  )
  assert [make.func.__name__ for make in begun] == [
    *("prefill", "capture", "attend", "select", "dense_with_lse", "quality")
  ]
  out = capsys.readouterr().out
  assert out.count("x 0.5 · 512 · 0: NotImplementedError: not here") == 1
  found = records.read(tmp_path / "run" / "records.jsonl")
  # What needs a clock comes last.
  assert [(r["kind"], r["pattern"]) for r in found] == [
    *[("layers", "x 0.8")] * 2,
    *[("layers", "x 0.9")] * 2,
    ("prefill", "dense"),
  ]


class LoweredForCuda(long_context_programs.Programs):
  """Texts in place of programs."""

  def build(self, traced):
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_study_programs_lower_for_cuda_with_one_kernel_for_all_layers(
  monkeypatch, tmp_path
):
  monkeypatch.setattr(device, "nvidia_compute_capability", lambda: (9, 0))
  config = study.get_config(str(tmp_path))
  config.dense_implementation = "tiled"  # cuDNN lowers on a card only
  programs = LoweredForCuda(
    frontier_config.parse(config).run,
    models.DecoderConfig(**study_model.get_config().model.to_dict()),
    (0,),
  )
  length = 131_072
  text = programs.prefill("unisparse 0.9", length)
  assert text.count("custom_call @mosaic_gpu") == 1
  assert programs.prefill("unisparse 0.95", length) is text
  assert "131072x2x128xbf16" in text  # the cache, with room for an answer
  text = programs.quality("sample v1 0.9", 0, length)
  assert "custom_call @mosaic_gpu" in text
  assert not programs.errors()


def test_captured_layers_are_timed_with_their_masks(
  monkeypatch, model_folder, in_process, tmp_path
):
  config = capture_smoke.get_config()
  config.model = str(model_folder)
  config.layers = (1,)
  settings = flags_and_configs.to_dataclass(
    capture_attention.CaptureConfig, config, name="config"
  )
  folder = str(tmp_path / "captured")
  assert len(list(capture_attention.capture(settings, folder))) == 1
  assert not list(capture_attention.capture(settings, folder))
  assert capture_attention.found_in(tmp_path / "captured") == [(512, 1)]
  q, k, _ = capture_attention.load(tmp_path / "captured", 512, 1)
  assert (q.shape, k.shape) == ((1, 512, 4, 16), (1, 512, 2, 16))
  with pytest.raises(ValueError, match=r"captured must hold"):
    capture_attention.load(tmp_path / "captured", 512, 0)

  speed = captured_smoke.get_config(str(tmp_path))
  speed.captured_model = str(model_folder)
  speed.matched = ""
  found = list(
    attention_speed_captured.measure_captured(
      attention_speed_config.parse(speed)
    )
  )
  assert [record.get("what") for record in found] == [
    *(None, "with selection", "selection", "real mask", "random mask"),
  ]
  assert not any("error" in record for record in found)
  mask = jax.jit(attention.UniSparse(**BLOCKS).select)(q, k)
  density = float(attention.metrics.density(mask).mean())
  assert found[1]["density"] == pytest.approx(density)
  other = attention_speed_captured.shuffled(mask, seed=0)
  np.testing.assert_array_equal(other.num_kv_blocks, mask.num_kv_blocks)
  listed = np.asarray(other.to_dense())
  assert (listed & ~np.asarray(mask.grid.admissible())[:, None]).sum() == 0
  assert listed.sum() == np.asarray(mask.num_kv_blocks).sum()
  assert listed[:, :, np.arange(8), np.arange(8)].all()  # the diagonal


def test_a_matched_line_becomes_its_pattern_again():
  sweeps = frontier_config.Sweep(
    label="v",
    method="minference",
    budget="heads",
    values=((("vertical_slash", 50, 100),),),
    settings=(("block_q", 64),),
  )
  line = {
    "label": "v 50 100",
    "method": sweeps.method,
    "settings": dict(sweeps.settings),
    "budget_field": "heads",
    "budget": [["vertical_slash", 50, 100]],
  }
  (expected,) = sweeps.entries()
  del expected["measure"]
  assert attention_speed_captured.pattern_of(line) == expected


def test_configs_of_the_study_agree(tmp_path):
  for module in (captured, captured_smoke):
    attention_speed_config.parse(module.get_config("out"))
  for module in (calibrate_study, calibrate_smoke):
    calibrate_answers_search.parse(module.get_config("out"))
  settings = flags_and_configs.to_dataclass(
    capture_attention.CaptureConfig, capture_study.get_config(), name="config"
  )
  num_layers = study_model.get_config().model.num_layers
  assert max(settings.layers) < num_layers
  heads = (("vertical_slash", 1000, 4096), ("block_sparse", 100, 0))
  searched = attention.Calibration(
    pattern="minference",
    settings={},
    layers=({"heads": heads}, {"heads": heads[:1]}),
    model_sha256="",
    target={},
  )
  (tmp_path / "minference").mkdir()
  records.write_json(
    tmp_path / "minference" / "calibration.json", searched.to_json()
  )
  more, by_head = (
    frontier_config.parse(module.get_config(str(tmp_path))).run
    for module in (study_more_prompts, study_by_head)
  )
  (entry,) = by_head.entries
  assert entry.patterns == searched.patterns()
  for name in ("tasks", "samples", "seed", "lengths", "captured_task"):
    assert getattr(more, name) == getattr(by_head, name)
  # What is calibrated is compiled as the sweep beside it.
  calibrated = calibrate_study.get_config()
  (scorer,) = calibrated.scorers
  (beside,) = (
    sweep
    for sweep in study.get_config().sweeps
    if sweep["method"] == "unisparse_threshold"
  )
  both = calibrated.settings.to_dict() | dict(scorer)
  assert both == {name: beside[name] for name in both}
