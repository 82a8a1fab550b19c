# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import subprocess
import sys
import types

import jax.numpy as jnp
import pytest

from configs.train_decoder import smoke
from experiments import train_decoder
from experiments.frame import flags_and_configs
from unisparse_jax import data, models, training
from unisparse_jax.data import sources

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def run_main(monkeypatch):
  """Runs main in this process, on a few dozen modules."""
  everything = sources.find_sources()
  train = [s for s in everything if not s.held_out and "/" not in s.name][:40]
  held_out = [s for s in everything if s.held_out and "/" not in s.name][:12]
  monkeypatch.setattr(
    sources, "find_sources", lambda extra_directories=(): train + held_out
  )
  # It would leave its settings behind for the tests after this one.
  monkeypatch.setattr(flags_and_configs, "start_jax", lambda workdir: None)

  def run(workdir, **overrides):
    config = smoke.get_config()
    config.update_from_flattened_dict(overrides)
    for name, value in (("_CONFIG", config), ("_WORKDIR", str(workdir))):
      holder = types.SimpleNamespace(value=value)
      monkeypatch.setattr(train_decoder, name, holder)
    train_decoder.main(["train_decoder"])

  return run


@pytest.mark.slow
def test_trains_resumes_and_exports(run_main, tmp_path):
  workdir = tmp_path / "run"
  run_main(workdir, **{"train.max_seconds": 1e-6})
  assert not (workdir / "model").exists()
  tokens = workdir / "data" / "corpus" / "train" / "tokens.npy"
  built = tokens.stat().st_mtime_ns
  run_main(workdir)
  assert tokens.stat().st_mtime_ns == built  # not made again
  with pytest.raises(ValueError, match=r"train\.seed is 0 there and 1 here"):
    run_main(workdir, **{"train.seed": 1})

  folder = workdir / "model"
  model = models.load_hf(folder)
  tokenizer = data.Tokenizer.load(folder / "tokenizer.json")
  prompt = jnp.asarray(tokenizer.encode("def main():\n"), jnp.int32)
  logits, _ = model(prompt[None])
  assert logits.shape == (1, len(prompt), 512)
  settings = json.loads((folder / "config.json").read_text())
  assert settings["eos_token_id"] == tokenizer.eos_id
  made = json.loads((folder / "training_config.json").read_text())
  assert made["train"]["stages"][1]["seq_len"] == 256
  evaluation = json.loads((folder / "evaluation.json").read_text())
  assert 4 < evaluation["unigram_entropy"] < 6.3
  assert {"loss_0_128", "loss_128_256", "vt_1024"} <= evaluation.keys()
  lines = training.read_metrics(folder / "metrics.jsonl")
  steps = [line["step"] for line in lines if line["kind"] == "train"]
  assert steps == [5, 10, 15, 20]


def test_unknown_keys_are_named(run_main, tmp_path):
  for section, cls in (("model", "DecoderConfig"), ("train", "TrainConfig")):
    config = smoke.get_config()
    with config.unlocked():
      config[section].depth = 3
    values = config[section]
    with pytest.raises(ValueError, match=rf"config\.{section} .*\['depth'\]"):
      flags_and_configs.to_dataclass(
        getattr({"model": models, "train": training}[section], cls),
        values,
        name=f"config.{section}",
      )
  with pytest.raises(ValueError, match=r"config\.data .*\['datas'\]"):
    flags_and_configs.check_keys(
      "config.data", {"seed": 0, "datas": 1}, ("seed",)
    )


def test_nothing_is_written_for_another_architecture(run_main, tmp_path):
  with pytest.raises(ValueError, match="initial must have the architecture of"):
    run_main(tmp_path / "run", **{"initial": "pylib_12m"})
  assert not (tmp_path / "run").exists()


def test_nothing_is_written_for_a_bad_config(run_main, tmp_path):
  with pytest.raises(ValueError, match="learning_rate must be"):
    run_main(tmp_path / "run", **{"train.learning_rate": float("nan")})
  assert not (tmp_path / "run").exists()


def run_program(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.train_decoder", *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_flags():
  config = "--config=configs/train_decoder/smoke.py"
  shown = run_program("--help").stdout
  assert "--workdir" in shown
  assert "goes on where an earlier one stopped" in shown
  missing = run_program(config)
  assert missing.returncode
  assert "--workdir" in missing.stderr
  unknown = run_program(config, "--workdir=unused", "--config.train.nope=1")
  assert unknown.returncode
  assert unknown.stderr.strip().splitlines()[-1].startswith("ValueError")
  assert "nope" in unknown.stderr
  assert not (ROOT / "unused").exists()
