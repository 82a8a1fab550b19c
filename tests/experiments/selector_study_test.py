# SPDX-License-Identifier: Apache-2.0
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.selector_study import default, similarity, smoke
from experiments import selector_study
from experiments.frame import flags_and_configs
from experiments.prefill import selector_study_curves, selector_study_scores
from tests import helpers
from unisparse_jax import attention, records


def test_writes_records_and_a_table(
  monkeypatch, tmp_path, model_folder, in_process
):
  few = ("mean 16", "full variance", "outlier key apart", "refined 32 to 4")
  variants = {name: selector_study_scores.VARIANTS[name] for name in few}
  monkeypatch.setattr(selector_study_scores, "VARIANTS", variants)
  # The tiny model has 4 heads on 2 key heads.
  for name in few[:3]:
    variants[name] = selector_study_scores.Composite(
      **vars(variants[name]) | {"head_group": 2}
    )
  del variants["refined 32 to 4"]
  config = smoke.get_config()
  config.model = str(model_folder)
  config.lengths, config.layers = (512,), (0, 1)
  config.group_text = "vt"
  for name, value in (("_CONFIG", config), ("_WORKDIR", str(tmp_path / "a"))):
    monkeypatch.setattr(
      selector_study, name, types.SimpleNamespace(value=value)
    )
  selector_study.main(["selector_study"])
  found = records.read(tmp_path / "a" / "records.jsonl")
  assert len(found) == 4
  table = json.loads((tmp_path / "a" / "table.json").read_text())
  variants = {row["variant"] for row in table["rows"]}
  means = [f"mean 16, mean of {x} heads" for x in ("a key head's", "similar")]
  assert {"oracle", *few[:3], *means} <= variants
  for record in found:  # 4 heads in two pairs
    assert sorted(head for g in record["groups"] for head in g) == [0, 1, 2, 3]
  assert {line["budgets"] for line in table["calibration"]} == {
    "one budget for all",
    "equal recall",
    "equal slope",
  }
  selector_study.main(["selector_study"])  # nothing is measured again
  assert len(records.read(tmp_path / "a" / "records.jsonl")) == 4


@pytest.mark.parametrize("module", [default, similarity, smoke])
def test_configs_are_valid(module):
  flags_and_configs.to_dataclass(
    selector_study.StudyConfig, module.get_config(), name="config"
  )


def test_bad_settings_are_named():
  values = smoke.get_config().to_dict()
  for change, message in (
    (dict(lengths=(1000,)), "block must divide lengths"),
    (dict(texts=("prose",)), "texts must be a known name"),
    (dict(targets=(2.0,)), "targets must be in"),
    (dict(lengths=()), "lengths must not be empty"),
    (dict(group_text="prose"), "group_text must be a known name"),
  ):
    with pytest.raises(ValueError, match=message):
      flags_and_configs.to_dataclass(
        selector_study.StudyConfig, values | change, name="config"
      )


def test_a_block_size_reaches_nested_variants():
  for variant in selector_study_scores.VARIANTS.values():
    text = repr(selector_study_scores.with_block(variant, 64))
    assert "block=64" in text and "block=128" not in text


def test_the_plain_variant_is_the_patterns_own_score():
  q, k, _ = helpers.make_qkv(q_len=128, num_heads=6)
  ours = selector_study_scores.Composite(
    window_q=8, window_kv=4, head_group=3, block=32
  )
  pattern = attention.UniSparse(
    window_q=8, window_kv=4, block_q=32, block_kv=32
  )
  grid = attention.BlockGrid.create(q, k, block_q=32, block_kv=32)
  expected = jax.jit(pattern.block_scores)(q, k, grid)[0]
  np.testing.assert_allclose(ours(q[0], k[0]), expected, atol=1e-5)


def test_an_outlier_apart_is_exact_where_the_other_keys_are_equal():
  rng = np.random.default_rng(0)
  q = rng.standard_normal((64, 2, 8))
  k = np.repeat(rng.standard_normal((8, 1, 2, 8)), 8, axis=1)
  k[:, 3] += 2.0 * rng.standard_normal((8, 2, 8))
  k = k.reshape(64, 2, 8)
  arrays = [jnp.asarray(x, jnp.float32) for x in (q, k)]
  # The last query of a window sees all of the window.
  settings = dict(window_q=8, query="last", window_kv=8, head_group=1, block=32)
  expected = np.zeros((2, 2, 2))
  for head in range(2):
    for i in range(7, 64, 8):
      p = np.exp(k[: i + 1, head] @ q[i, head] / np.sqrt(8))
      p = np.pad(p / p.sum(), (0, 63 - i)).reshape(2, 32).sum(1)
      expected[head, i // 32] += p / 4
  apart, plain = (
    selector_study_scores.Composite(key=key, **settings)(*arrays)
    for key in ("outlier", "mean")
  )
  np.testing.assert_allclose(apart, expected, atol=1e-5)
  assert np.abs(plain - expected).max() > 0.001


def test_heads_that_look_alike_share_a_group_and_its_mean():
  rng = np.random.default_rng(0)
  kinds = rng.random((3, 8, 8)) ** 4
  scores = kinds[[0, 1, 2, 1, 0, 2]] + 0.01 * rng.random((6, 8, 8))
  scores /= scores.sum(-1, keepdims=True)
  groups = selector_study_scores.similar_heads(scores, 2)
  assert groups == ((0, 4), (1, 3), (2, 5))
  shared = selector_study_scores.mean_of_groups(scores, groups)
  np.testing.assert_array_equal(shared[4], (scores[0] + scores[4]) / 2)
  np.testing.assert_array_equal(shared[4], shared[0])
  assert selector_study_scores.similar_heads(scores, 1) == tuple(
    (head,) for head in range(6)
  )


def test_curves_count_what_a_mask_keeps():
  q, k, _ = helpers.make_qkv(q_len=256)
  q = 2.0 * q
  blocks = dict(block_q=32, block_kv=32)
  grid = attention.BlockGrid.create(q, k, **blocks)
  pattern = attention.UniSparse(window_q=8, window_kv=8, **blocks)
  scores = np.asarray(jax.jit(pattern.block_scores)(q, k, grid)[0])
  mass = np.asarray(jax.jit(attention.metrics.block_mass)(q, k, grid)[0])
  found = selector_study_curves.curves(scores, mass)["top_p"]
  for p in (0.7, 0.9):
    pattern = attention.UniSparse(top_p=p, window_q=8, window_kv=8, **blocks)
    mask = jax.jit(pattern.select)(q, k)
    index = selector_study_curves.TOP_P.index(p)
    density = np.repeat(np.asarray(attention.metrics.density(mask))[0], 2)
    np.testing.assert_allclose(found["density"][:, index], density, atol=1e-6)
    recall = np.asarray(jax.jit(attention.metrics.recall)(q, k, mask))
    recall = recall[0].mean(0)
    np.testing.assert_allclose(found["recall"][:, index], recall, atol=1e-5)


def test_a_threshold_with_the_true_mass_beats_top_p():
  rng = np.random.default_rng(0)
  mass = np.tril(rng.random((2, 16, 16)) ** 8 + 1e-3)
  mass[:, ::2] = np.tril(np.ones((16, 16)))[::2]  # half of the rows are flat
  mass /= mass.sum(-1, keepdims=True)
  found = selector_study_curves.curves(mass, mass)
  at = {
    rule: selector_study_curves.density_at(
      found[rule]["density"].mean(0), found[rule]["recall"].mean(0), 0.8
    )
    for rule in ("top_p", "threshold")
  }
  assert at["threshold"] < at["top_p"]
  assert np.isnan(selector_study_curves.density_at([0.1], [0.5], 0.8))
