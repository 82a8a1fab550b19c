# SPDX-License-Identifier: Apache-2.0
import logging

import pytest

from unisparse_jax import training
from unisparse_jax.training import metrics


def test_lines_after_the_checkpoint_are_written_anew(tmp_path):
  writer = metrics.MetricWriter(tmp_path, step=0)
  for step in (2, 4, 6):
    writer.write("train", step, {"loss": float(step)})
  writer.write("eval", 6, {"loss": 0.0})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "st')
  writer = metrics.MetricWriter(tmp_path, step=4)
  writer.write("train", 6, {"loss": -6.0})
  writer.close()
  lines = training.read_metrics(tmp_path / "metrics.jsonl")
  assert [(line["step"], line["loss"]) for line in lines] == [
    (2, 2.0),
    (4, 4.0),
    (6, -6.0),
  ]


def test_unreadable_line_in_the_middle_is_an_error(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(ValueError, match="line 2"):
    training.read_metrics(path)


def test_progress_without_a_terminal_logs_lines(caplog):
  caplog.set_level(logging.INFO, "unisparse_jax")
  progress = metrics.Progress(100, step=0)
  values = {
    "stage": 1,
    "seq_len": 64,
    "loss": 1.5,
    "code_loss": None,
    "answer_accuracy": 0.25,
    "tokens_per_s": 1234567.0,
    "seconds_left": 75.0,
  }
  progress.show(50, values)
  progress.close()
  (line,) = caplog.messages
  assert line == (
    "step 50/100  stage 1 (64 tokens)  loss 1.500  answers 25.0%  "
    "tokens/s 1,234,567  left 1m15s"
  )


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True)
  progress = metrics.Progress(10, step=0)
  progress.note("hello")
  progress.show(5, {"stage": 0, "seq_len": 64, "loss": 1.5})
  progress.close()
  captured = capsys.readouterr()
  shown = captured.out + captured.err
  assert "hello" in shown
  assert "5/10" in shown


def test_disabled_progress_is_silent(caplog):
  caplog.set_level(logging.INFO)
  metrics.Progress(10, step=0, enabled=False).note("hello")
  assert not caplog.messages


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(7.4, "7s"), (59.6, "1m00s"), (185, "3m05s"), (3725, "1h02m")],
)
def test_format_seconds(seconds, text):
  assert metrics.format_seconds(seconds) == text
