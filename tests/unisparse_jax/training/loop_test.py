# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import math
import types

import jax
import numpy as np
import pytest
from flax import nnx

from tests.unisparse_jax.training import tiny_run
from unisparse_jax import attention, models, training
from unisparse_jax.training import clock


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learns_to_count(tmp_path, optimizer):
  result = tiny_run.train(
    tmp_path / "run",
    stages=(training.Stage(seq_len=16, batch_size=32, steps=120),),
    learning_rate=3e-2,
    optimizer=optimizer,
    checkpoint_every=1000,
    eval_every=0,
    log_every=20,
  )
  lines = training.read_metrics(tmp_path / "run" / "metrics.jsonl")
  assert [line["step"] for line in lines] == list(range(20, 121, 20))
  assert lines[0]["loss"] > 2.0
  assert lines[-1]["loss"] < 0.5
  assert lines[-1]["answer_accuracy"] > 0.9
  rows = [tiny_run.Rows(7, 16)[i] for i in range(8)]
  held_out = training.loss_by_position(
    result.model,
    np.stack([row["tokens"] for row in rows]),
    edges=(0, 2, 16),
    batch_size=4,
    attention_fn=attention.DenseAttention(implementation="xla"),
  )
  # The first token tells nothing of the stride, the second all.
  assert held_out["loss_0_2"] > 3 * held_out["loss_2_16"]


def test_metrics_evaluation_and_dtypes(tmp_path):
  kept = []

  def evaluate(model, step):
    kept.append((step, model))
    return {"loss": 1.25}

  result = tiny_run.train(
    tmp_path / "run",
    evaluate=evaluate,
    eval_every=8,
    z_loss=1e-3,
    dtype="bfloat16",
    attention="tiled",
  )
  lines = training.read_metrics(tmp_path / "run" / "metrics.jsonl")
  first = lines[0]
  for name in (
    "answer_accuracy",
    "answer_loss",
    "code_loss",
    "grad_norm",
    "learning_rate",
    "loss",
    "seconds_left",
    "tokens_per_s",
  ):
    assert math.isfinite(first[name]), name
  assert (first["stage"], first["seq_len"], first["tokens"]) == (0, 16, 128)
  last = [line for line in lines if line["kind"] == "train"][-1]
  assert (last["stage"], last["seq_len"]) == (1, 32)
  assert last["tokens"] == 8 * 64 + 7 * 64
  assert last["seconds_left"] == 0
  evaluations = [line for line in lines if line["kind"] == "eval"]
  assert [line["loss"] for line in evaluations] == [1.25, 1.25]
  assert list((tmp_path / "run" / "tensorboard").glob("events.*"))

  assert [(step, type(model)) for step, model in kept] == [
    (8, models.Decoder),
    (15, models.Decoder),
  ]
  # The first one was not overwritten by the steps after it.
  early, late = (np.asarray(m.embed.embedding[...]) for _, m in kept)
  assert not np.array_equal(early, late)
  leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.split(result.model)[1]))
  assert {leaf.dtype.name for leaf in leaves} == {"float32"}
  assert result.model.dtype == jax.numpy.bfloat16


def test_diverging_run_says_so_and_keeps_its_checkpoint(tmp_path):
  class Poisoned(tiny_run.Rows):
    def __getitem__(self, index):
      row = super().__getitem__(index)
      if index >= 24:
        row["loss_weights"][3] = np.inf
      return row

  with pytest.raises(FloatingPointError, match=r"at step 7.* of step 4"):
    training.train(
      tiny_run.make_config(),
      tiny_run.MODEL,
      lambda index, stage: Poisoned(index, stage.seq_len),
      tmp_path / "run",
      show_progress=False,
    )
  assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_stage_longer_than_the_model_is_refused(tmp_path):
  short = dataclasses.replace(tiny_run.MODEL, max_len=16)
  with pytest.raises(ValueError, match=r"seq_len=32, max_len=16"):
    training.train(
      tiny_run.make_config(), short, tiny_run.make_source, tmp_path / "run"
    )
  assert not (tmp_path / "run").exists()


def test_begins_with_the_weights_of_another_model(tmp_path):
  first = tiny_run.train(tmp_path / "first").model

  def train(workdir, initial, model_config=tiny_run.MODEL):
    stage = training.Stage(seq_len=16, batch_size=4, steps=2)
    return training.train(
      tiny_run.make_config(stages=(stage,), warmup_steps=1, learning_rate=1e-9),
      model_config,
      tiny_run.make_source,
      workdir,
      show_progress=False,
      initial=initial,
    ).model

  longer = dataclasses.replace(tiny_run.MODEL, max_len=128)
  model = train(tmp_path / "second", first, longer)
  assert model.config.max_len == 128
  jax.tree.map(
    lambda new, old: np.testing.assert_allclose(new, old, atol=1e-6),
    nnx.to_pure_dict(nnx.state(model)),
    nnx.to_pure_dict(nnx.state(first)),
  )
  wider = dataclasses.replace(tiny_run.MODEL, mlp_dim=96)
  with pytest.raises(ValueError, match="initial must have the architecture of"):
    train(tmp_path / "third", first, wider)
  assert not (tmp_path / "third").exists()


def test_export_can_be_loaded(whole, tmp_path):
  workdir, result = whole
  folder = training.export(
    result.model,
    tmp_path / "model",
    training_config=tiny_run.make_config(),
    metrics_file=workdir / "metrics.jsonl",
    summary={"loss": 1.0},
    extra={"eos_token_id": 2},
  )
  assert sorted(p.name for p in folder.iterdir()) == [
    "config.json",
    "evaluation.json",
    "metrics.jsonl",
    "model.safetensors",
    "training_config.json",
  ]
  loaded = models.load_hf(folder)
  saved = nnx.to_pure_dict(nnx.split(result.model)[1])
  for x, y in zip(
    jax.tree.leaves(saved),
    jax.tree.leaves(nnx.to_pure_dict(nnx.split(loaded)[1])),
    strict=True,
  ):
    rounded = np.asarray(x.astype(jax.numpy.bfloat16), np.float32)
    np.testing.assert_array_equal(rounded, np.asarray(y, np.float32))


def test_a_budget_gives_every_stage_its_share(tmp_path, monkeypatch):
  ticks = itertools.count(step=0.01)
  fake = types.SimpleNamespace(monotonic=lambda: next(ticks))
  monkeypatch.setattr(clock, "time", fake)
  many = 100_000
  stages = (
    training.Stage(seq_len=16, batch_size=4, steps=many),
    training.Stage(seq_len=32, batch_size=2, steps=many),
  )
  config = tiny_run.make_config(
    stages=stages, fit_budget=True, max_seconds=3.0, warmup_steps=5,
    log_every=1, checkpoint_every=many, schedule="wsd", decay_fraction=0.5,
  )  # fmt: skip
  result = training.train(
    config, tiny_run.MODEL, tiny_run.make_source, tmp_path,
    show_progress=False,
  )  # fmt: skip
  assert result.finished
  lines = [
    line
    for line in training.read_metrics(tmp_path / "metrics.jsonl")
    if line["kind"] == "train"
  ]
  counts = [sum(line["stage"] == s for line in lines) for s in (0, 1)]
  assert min(counts) > 20
  rates = [line["learning_rate"] for line in lines]
  assert max(rates) == pytest.approx(config.learning_rate)
  assert rates[-1] < 0.2 * config.learning_rate
  # Going on finds nothing left to do.
  again = training.train(
    config, tiny_run.MODEL, tiny_run.make_source, tmp_path,
    show_progress=False,
  )  # fmt: skip
  assert again.step == result.step


def test_a_budget_needs_a_time():
  with pytest.raises(ValueError, match="max_seconds must be given"):
    tiny_run.make_config(fit_budget=True, max_seconds=None)
