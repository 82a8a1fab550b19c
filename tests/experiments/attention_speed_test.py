# SPDX-License-Identifier: Apache-2.0
import dataclasses
import io
import itertools
import types

import numpy as np
import pytest
import rich.console

from configs.attention_speed import default, million, quick, smoke, targets
from experiments import attention_speed
from experiments.kernels import attention_speed_config, attention_speed_run
from unisparse_jax import records


def test_smoke_config_writes_records_and_figure(tmp_path, monkeypatch):
  for name, value in (
    ("_CONFIG", smoke.get_config()),
    ("_WORKDIR", str(tmp_path)),
  ):
    holder = types.SimpleNamespace(value=value)
    monkeypatch.setattr(attention_speed, name, holder)
  attention_speed.main(["attention_speed"])
  written = records.read(tmp_path / "records.jsonl")
  timed = {
    (r["method"], r["direction"], r["density"])
    for r in written
    if r.get("tflops", 0) > 0
  }
  for direction in ("forward", "backward"):
    for density in (1.0, 0.25):
      assert ("ours", direction, density) in timed
    assert ("xla_dense", direction, 1.0) in timed
    assert ("columns", direction, 24 / 256) in timed
  (attended,) = (r for r in written if r["method"] == "unisparse")
  assert attended["tflops"] > 0 and 0.3 < attended["density"] <= 0.5
  # What cannot run here says so and is no time.
  refused = {r["method"] for r in written if "error" in r}
  assert refused == {"cudnn", "tokamax"}
  assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("config", [default, million, quick, targets])
def test_configs_parse(config):
  attention_speed_config.parse(config.get_config())


def test_default_times_gradients_and_every_length():
  config = attention_speed_config.parse(default.get_config())
  assert {c.length for c in config.cases} == {
    *(1 << n for n in range(12, 18)),
    1 << 20,
  }
  gradients = {(c.length, c.head_dim): c for c in config.cases if c.backward}
  for size in ((4096, 128), (32768, 128), (32768, 64), (131072, 128)):
    case = gradients[size]
    assert case.densities == (1.0, 0.5, 0.25, 0.1, 0.05)
    assert set(case.peers) & set(attention_speed_config.DENSE)
  (million,) = (c for c in config.cases if c.length == 1 << 20)
  assert million.selection and million.selected_densities == (0.03,)
  # Bytes of the lists: for each mask head and block of queries.
  pattern = attention_speed_run._make(config.attended)
  blocks = million.length // config.block
  lists = 4 * config.num_mask_heads * blocks * pattern.max_blocks
  assert lists <= 1 << 28


@pytest.fixture
def run_torch(monkeypatch, tmp_path):
  """The records of the PyTorch peers, by a script in place of Python."""

  def run(script, **settings):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(attention_speed.sys, "executable", str(program))
    config = attention_speed_config.parse(smoke.get_config())
    config = dataclasses.replace(config, **settings)
    return [*attention_speed._measure_torch(config)]

  return run


TRACEBACK = """\
Traceback (most recent call last):
  File "/opt/venv/lib/python3/site-packages/torch/__init__.py", line 1
    import fast
ImportError: /opt/venv/lib/libfast.so.1 has no table of 16 KiB/s
"""


def test_what_a_failed_process_said_last_is_recorded_and_shown(
  run_torch, capfd
):
  first, last = run_torch(
    f"""echo '{{"method": "torch_flash2"}}'\ncat >&2 <<'END'\n{TRACEBACK}END
exit 3"""
  )
  assert first == {"method": "torch_flash2"}
  assert last == {
    "method": "torch",
    "error": "exit status 3: ImportError: libfast.so.1 has no table of "
    "16 KiB/s",
  }
  assert capfd.readouterr().err == TRACEBACK


def test_words_of_a_failed_process_are_few(run_torch, capfd):
  (record,) = run_torch("printf '%0400d!' 7 >&2; exit 1")
  assert record["error"] == "exit status 1: " + 298 * "0" + "7!"
  (record,) = run_torch("exit 1")
  assert record["error"] == "exit status 1"
  assert run_torch("echo /a/warning >&2") == []
  assert capfd.readouterr().err.endswith("7!/a/warning\n")


def test_a_stopped_process_says_so_too(run_torch, capfd):
  (record,) = run_torch(
    "echo compiling for too long >&2; exec sleep 60", torch_timeout_s=1
  )
  assert record["error"] == "stopped after 1 s: compiling for too long"
  assert capfd.readouterr().err == "compiling for too long\n"


def test_random_lists_have_the_density_and_the_diagonal_first():
  lists, counts = attention_speed_run.random_lists(
    4096, 0.25, block=64, num_mask_heads=3, seed=1
  )
  assert lists.shape[:3] == counts.shape == (1, 3, 64)
  assert abs(counts[0, 0].sum() / (64 * 65 / 2) - 0.25) < 0.01
  for head, row in np.ndindex(3, 64):
    kept = lists[0, head, row, : counts[0, head, row]]
    assert kept[0] == row
    assert (np.diff(kept) < 0).all() and kept[-1] >= 0
  assert not np.array_equal(lists[0, 0], lists[0, 1])


def test_ratios_are_to_the_fastest_dense_peer_of_the_size():
  def record(method, ms, tflops, **size):
    size = {"length": 8, "head_dim": 64, "direction": "forward", **size}
    return {"method": method, "median_ms": ms, "tflops": tflops, **size}

  rows = attention_speed.add_ratios(
    [
      record("ours", 1.0, 500.0),
      record("cudnn", 4.0, 400.0),
      record("torch_cudnn", 3.0, 600.0),
      record("cudnn", 1.0, 900.0, length=16),
      record("torch_flex", 0.5, 100.0),
      dict(method="selection", length=8, head_dim=64, median_ms=0.06),
      dict(
        method="xattention",
        what="selection",
        length=8,
        head_dim=64,
        median_ms=0.3,
      ),
    ]
  )
  ours, slow, fast, other, flex, chosen, captured = rows
  assert ours["best_dense"] == "torch_cudnn"
  assert ours["speed_up"] == 3.0 and ours["rate_ratio"] == 500 / 600
  assert slow["speed_up"] == 0.75 and fast["speed_up"] == 1.0
  assert other["speed_up"] == 1.0 and flex["speed_up"] == 6.0
  assert chosen["selection_share"] == pytest.approx(0.02)
  assert captured["selection_share"] == pytest.approx(0.1)
  assert not {"speed_up"} & {*chosen, *captured}
  printed = io.StringIO()
  console = rich.console.Console(file=printed, width=200)
  console.print(attention_speed._table(rows))
  lines = [x for x in printed.getvalue().splitlines() if "selection │" in x]
  assert "2.0%" in lines[0] and "10.0%" in lines[1] and len(lines) == 2


def test_a_panel_with_one_density_has_the_ticks_of_all():
  def record(method, density, length):
    size = {"length": length, "head_dim": 64, "direction": "forward"}
    return {"method": method, "density": density, "tflops": 500.0, **size}

  figure = attention_speed._figure(
    [
      record("ours", 1.0, 8),
      record("ours", 0.05, 8),
      record("tokamax", 1.0, 8),
      record("cudnn", 1.0, 8),
      record("ours", 0.03, 16),
      record("unisparse", 0.029986, 16),
    ]
  )
  figure.canvas.draw()
  panels = [axis for axis in figure.axes if axis.get_visible()]
  assert len(panels) == 2
  for axis in panels:
    labels = axis.get_xticklabels(which="both")
    assert [x.get_text() for x in labels] == "0.025 0.05 0.1 0.25 0.5 1".split()
    boxes = [x.get_window_extent() for x in labels]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
  (legend,) = figure.legends
  assert [x.get_text() for x in legend.get_texts()] == [
    *("ours", "tokamax (dense)", "cudnn (dense)", "unisparse")
  ]
  dense = [x for x in panels[0].lines if x.get_marker() == "None"]
  styles = {x.get_linestyle() for x in dense}
  assert len(styles) == 2  # one may lie upon the other


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(length=100), r"block must divide length"),
    (dict(peers=("flash3",)), r"peer must be a known name"),
    (dict(densities=(0.0,)), r"density must be in \(0, 1\]"),
  ],
)
def test_bad_settings_are_named(change, message):
  config = smoke.get_config().to_dict()
  config["cases"] = [{**config["cases"][0], **change}]
  with pytest.raises(ValueError, match=message):
    attention_speed_config.parse(config)
