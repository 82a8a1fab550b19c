# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import numpy as np
import pytest

from unisparse_jax.speculative import calibration

THRESHOLDS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0)


def make(**changes):
  rule = calibration.rule_table(
    THRESHOLDS, base_depth=8, base_nodes=60, width=10, max_depth=12,
    max_nodes=63,
  )  # fmt: skip
  values = dict(
    drafter_hash="abc",
    thresholds=THRESHOLDS,
    base_depth=8,
    width=10,
    path_choice="cumulative",
    tables=(
      rule,
      dataclasses.replace(rule, name="joint", batch=1, depth=(9,) * 8),
      dataclasses.replace(rule, name="joint", batch=16, drafts=False),
    ),
    costs=(
      calibration.StepCosts(
        batch=4, buckets=(1, 8), fixed_ms=0.1, draft_ms=0.1,
        verify_ms=(1.0, 1.5), plain_ms=0.9,
      ),
    ),
  )  # fmt: skip
  return calibration.Artefact(**(values | changes))


def test_the_papers_rule():
  table = make().table("rule", 1)
  assert table.depth == (12, 11, 10, 8, 8, 8, 8, 8)
  assert table.nodes == (22, 39, 62, 60, 60, 60, 60, 60)
  other = calibration.rule_table(
    THRESHOLDS, base_depth=8, base_nodes=60, width=10, max_depth=12,
    max_nodes=63, first_bin=1,
  )  # fmt: skip
  assert other.depth[:3] == (11, 10, 9)
  assert other.nodes[:3] == (21, 38, 61)


def test_round_trip(tmp_path):
  artefact = make(thresholds=(*THRESHOLDS[:5], np.inf, np.inf))
  calibration.save(artefact, tmp_path / "policy.json")
  json.loads((tmp_path / "policy.json").read_text())  # no bare Infinity
  found = calibration.load(tmp_path / "policy.json")
  assert found == artefact
  assert found.cost(1) == found.cost(64) == artefact.costs[0]


def test_serves_its_own_drafter_alone():
  artefact = make()
  made = artefact.policy("joint", batch=1, drafter_hash="abc")
  np.testing.assert_array_equal(made.depth, [9] * 8)
  with pytest.raises(ValueError, match="artefact must be fitted for this"):
    artefact.policy("joint", batch=1, drafter_hash="abd")


def test_the_next_larger_batch_and_no_drafts():
  artefact = make()
  assert artefact.table("joint", 4).batch == 16
  assert artefact.table("joint", 64).batch == 16
  made = artefact.policy("joint", batch=64, drafter_hash="abc")
  assert set(np.asarray(made.nodes)) == {0}
  assert made.declines  # or it would draft, and throw the drafts away
  with pytest.raises(ValueError, match="name must be a table of the artefact"):
    artefact.table("best", 1)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda v: v.update(format="other"), "format must be"),
    (lambda v: v["thresholds"].reverse(), "thresholds must be increasing"),
    (lambda v: v["tables"][0].update(nodes=[1]), "nodes must"),
  ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
  file = tmp_path / "policy.json"
  calibration.save(make(), file)
  values = json.loads(file.read_text())
  change(values)
  file.write_text(json.dumps(values))
  with pytest.raises(ValueError, match=message):
    calibration.load(file)
  file.write_text("{")
  with pytest.raises(ValueError, match="path must hold JSON"):
    calibration.load(file)
  with pytest.raises(ValueError, match="path must name a calibration"):
    calibration.load(tmp_path / "none.json")
