# SPDX-License-Identifier: Apache-2.0
import types

import pytest

from configs.lookup_drafters import default, smoke
from experiments import lookup_drafters
from experiments.frame import flags_and_configs
from unisparse_jax import records, speculative


def test_writes_a_line_for_every_drafter(
  monkeypatch, tmp_path, model_folder, in_process
):
  config = smoke.get_config()
  config.model = str(model_folder)
  config.texts, config.new_tokens = ("table",), 8
  for name, value in (("_CONFIG", config), ("_WORKDIR", str(tmp_path / "a"))):
    monkeypatch.setattr(
      lookup_drafters, name, types.SimpleNamespace(value=value)
    )
  # Fewer sizes compile faster.
  shapes = (
    speculative.TreeShape(width=1, base_depth=8, buckets=(9,)),
    speculative.TreeShape(width=2, base_depth=4, buckets=(8,)),
  )
  small = {
    name: (drafter, shape)
    for (name, (drafter, _)), shape in zip(
      lookup_drafters.DRAFTERS.items(), shapes, strict=True
    )
  }
  monkeypatch.setattr(lookup_drafters, "DRAFTERS", small)
  lookup_drafters.main(["lookup_drafters"])
  found = records.read(tmp_path / "a" / "records.jsonl")
  assert [r["drafter"] for r in found] == ["none", *small]
  for record in found[1:]:
    assert record["identical"] == record["prompts"] == 1
    assert 1 <= record["tokens_per_step"] <= 13
    assert record["target_calls"] <= 7
  lookup_drafters.main(["lookup_drafters"])  # Nothing is measured twice.
  assert records.read(tmp_path / "a" / "records.jsonl") == found


def test_configs_are_valid():
  for config in (default.get_config(), smoke.get_config()):
    flags_and_configs.to_dataclass(
      lookup_drafters.LookupConfig, config, name="config"
    )
  with pytest.raises(ValueError, match=r"^texts must be a known name"):
    lookup_drafters.LookupConfig(model="pylib_12m", texts=("poems",))
