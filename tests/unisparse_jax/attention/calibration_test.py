# SPDX-License-Identifier: Apache-2.0
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import helpers
from unisparse_jax import attention, models, records
from unisparse_jax.attention import calibration

BLOCKS = dict(block_q=32, block_kv=32)


def make(**changes):
  values = dict(
    pattern="xattention",
    settings={**BLOCKS, "stride": 4},
    layers=({"top_p": [0.5, 0.9, 0.5, 0.9]}, {"top_p": [0.6] * 4}),
    model_sha256="0123456789abcdef",
    target={"recall": 0.9},
    dense_below=7,
  )
  return attention.Calibration(**values | changes)


def test_equal_recall_takes_the_sparsest_that_reaches_the_target():
  density = np.array([[0.1, 0.2, 0.4], [0.2, 0.3, 0.5], [0.1, 0.2, 0.3]])
  recall = np.array([[0.9, 0.95, 0.99], [0.5, 0.7, 0.92], [0.1, 0.2, 0.2]])
  chosen = calibration.choose_budgets(density, recall, 0.9)
  # The third head never gets there: the sparsest of its best.
  np.testing.assert_array_equal(chosen, [0, 2, 1])


def test_equal_slope_is_the_cheapest_mixture_on_the_hulls():
  rng = np.random.default_rng(0)
  density = np.sort(rng.random((4, 6)), axis=1)
  # Concave curves: every point is on its hull.
  recall = np.sqrt(density) * rng.uniform(0.8, 1.0, (4, 1))
  target = 0.7
  chosen = calibration.choose_budgets(density, recall, target, "equal_slope")
  heads = np.arange(4)
  mean_recall = recall[heads, chosen].mean()
  assert mean_recall >= target
  # No mixture reaches at least that recall with fewer blocks.
  choices = np.stack(np.meshgrid(*[np.arange(6)] * 4), -1).reshape(-1, 4)
  recalls = recall[heads, choices].mean(1)
  cost = np.where(
    recalls >= mean_recall - 1e-9, density[heads, choices].mean(1), 9
  )
  assert density[heads, chosen].mean() <= cost.min() + 1e-9
  same = calibration.choose_budgets(density, recall, target)
  assert density[heads, chosen].mean() < density[heads, same].mean()


def test_a_target_that_none_reaches_gives_the_fullest():
  density, recall = np.array([[0.1, 0.5]]), np.array([[0.2, 0.6]])
  for rule in calibration.RULES:
    assert calibration.choose_budgets(density, recall, 0.9, rule) == [1]


def test_budgets_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="rule must be a known name"):
    calibration.choose_budgets(np.ones((1, 1)), np.ones((1, 1)), 0.9, "best")
  with pytest.raises(ValueError, match=r"recall must have shape"):
    calibration.choose_budgets(np.ones((1, 2)), np.ones((1, 1)), 0.9)
  with pytest.raises(ValueError, match="target must be in"):
    calibration.choose_budgets(np.ones((1, 1)), np.ones((1, 1)), 1.5)


@pytest.mark.parametrize("seed", range(6))
def test_lowered_steps_are_the_best_of_all_settings(seed):
  rng = np.random.default_rng(seed)
  num_heads, num_budgets = 4, 4
  # Falling, as recall is; or any, with equal ones, of which a greedy search
  # that takes the best single step misses the best pair.
  performance = rng.integers(0, 6, (num_heads, num_budgets)) / 8.0
  if seed % 2:
    performance = -np.sort(-rng.random((num_heads, num_budgets)), axis=1)
  settings = list(itertools.product(range(num_budgets), repeat=num_heads))
  heads = np.arange(num_heads)
  best, steps = calibration.lower_steps(performance)
  assert steps.shape == (num_heads * (num_budgets - 1) + 1, num_heads)
  for count in range(len(best)):
    assert steps[count].sum() == count
    assert performance[heads, steps[count]].sum() == pytest.approx(best[count])
    expected = max(
      performance[heads, list(s)].sum() for s in settings if sum(s) == count
    )
    assert best[count] == pytest.approx(expected)

  # The rule takes the sparsest of these that reaches the target.
  density = -np.sort(-rng.random((num_heads, num_budgets)), axis=1)
  target = float(np.clip(performance.mean(), 0.1, 1.0))
  index = calibration.choose_budgets(
    density, performance, target, "lowered_steps"
  )
  allowed = [s for s in steps if performance[heads, s].mean() >= target - 1e-9]
  assert performance[heads, index].mean() >= target - 1e-9
  assert density[heads, index].mean() == pytest.approx(
    min(density[heads, s].mean() for s in allowed)
  )


@pytest.mark.parametrize("seed", range(4))
def test_fewest_blocks_are_the_fewest_of_all_settings(seed):
  rng = np.random.default_rng(seed)
  num_heads, num_budgets, target = 4, 4, 0.7
  density = np.sort(rng.random((num_heads, num_budgets)), axis=1)
  # Whole units of loss, so that rounding plays no part.
  recall = np.sort(rng.integers(0, 21, (num_heads, num_budgets)), axis=1) / 20
  recall[:, -1] = 1.0
  heads = np.arange(num_heads)
  index = calibration.fewest_blocks(density, recall, target, num_levels=24)
  assert recall[heads, index].mean() >= target - 1e-9
  expected = min(
    density[heads, list(s)].mean()
    for s in itertools.product(range(num_budgets), repeat=num_heads)
    if recall[heads, list(s)].mean() >= target - 1e-9
  )
  assert density[heads, index].mean() == pytest.approx(expected)
  # Of any losses, the target is kept, and no other rule is sparser.
  recall = np.sort(rng.random((num_heads, num_budgets)), axis=1)
  for rule in calibration.RULES:
    other = calibration.choose_budgets(density, recall, 0.6, rule)
    ours = calibration.choose_budgets(density, recall, 0.6, "fewest_blocks")
    if recall[:, -1].mean() >= 0.6:
      assert recall[heads, ours].mean() >= 0.6
      if recall[heads, other].mean() >= 0.6:
        assert density[heads, ours].mean() <= (
          density[heads, other].mean() + 1e-9
        )


def test_a_greedy_search_would_miss_what_the_table_finds():
  # The first head loses nothing by two steps, though the first one costs.
  performance = np.array([[1.0, 0.5, 1.0], [1.0, 0.9, 0.8]])
  best, steps = calibration.lower_steps(performance)
  np.testing.assert_allclose(best, [2.0, 1.9, 2.0, 1.9, 1.8])
  np.testing.assert_array_equal(steps[2], [2, 0])
  with pytest.raises(ValueError, match=r"performance must have shape"):
    calibration.lower_steps(np.ones(3))


def test_xattention_threshold_on_a_map_by_hand():
  true = np.array([[[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.5, 0.45, 0.05]]])
  estimated = np.array([[[1.0, 0.0, 0.0], [0.3, 0.7, 0.0], [0.2, 0.5, 0.3]]])
  # 0.9 of the rows needs {0}; {0, 1}; {0, 1}, whose lowest scores are 1.0, 0.3
  # and 0.2: all that scores as much is 1.0; 1.0; 1.0 of the rows.
  np.testing.assert_allclose(
    calibration.xattention_threshold(estimated, true, 0.9), [1.0]
  )
  # 0.45 needs {0} everywhere: of the last row only its first block is kept.
  estimated[0, 2] = [0.5, 0.2, 0.3]
  np.testing.assert_allclose(
    calibration.xattention_threshold(estimated, true, 0.45), [2.5 / 3]
  )


def test_a_file_gives_back_what_was_written(tmp_path):
  records.write_json(tmp_path / "a.json", make().to_json())
  found = attention.load_calibration(
    tmp_path / "a.json", model_sha256="0123456789abcdef"
  )
  assert found.patterns() == make().patterns()
  layered = found.attention(implementation="xla")
  assert hash(layered) == hash(make().attention(implementation="xla"))
  assert layered.layers[0].pattern.top_p == (0.5, 0.9, 0.5, 0.9)
  assert layered.layers[0].dense_below == 7
  with pytest.raises(ValueError, match=r"a\.json.*for weights 01234"):
    attention.load_calibration(tmp_path / "a.json", model_sha256="ffff")


def test_heads_of_minference_come_back_as_tuples(tmp_path):
  heads = [["a_shape", 4, 8], ["vertical_slash", 4, 8]]
  written = make(
    pattern="minference", settings=BLOCKS, layers=({"heads": heads},)
  )
  records.write_json(tmp_path / "a.json", written.to_json())
  (pattern,) = attention.load_calibration(tmp_path / "a.json").patterns()
  assert pattern.heads == (("a_shape", 4, 8), ("vertical_slash", 4, 8))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda v: "no json", "Expecting value"),
    (lambda v: [v], "its format is"),
    (lambda v: v | {"format": "2"}, "its format is"),
    (lambda v: v | {"more": 1}, "keys differ: .'more'"),
    (lambda v: {k: v[k] for k in v if k != "layers"}, "keys differ: .'layers'"),
    (lambda v: v | {"layers": []}, "layers are no objects"),
    (lambda v: v | {"layers": [1]}, "layers are no objects"),
    (lambda v: v | {"dense_below": "x"}, "dense_below is no int"),
    (lambda v: v | {"dense_below": -1}, "dense_below must be an integer >= 0"),
    (lambda v: v | {"pattern": "none"}, "pattern must be a known name"),
    (lambda v: v | {"layers": [{"top_p": 2.0}]}, "top_p must be in"),
    (lambda v: v | {"layers": [{"top_p": "x"}]}, "top_p must be in"),
    (lambda v: v | {"layers": [{"depth": 2}]}, "setting of xattention must"),
    (lambda v: v | {"settings": {"block_q": [1]}}, "block_q must be an int"),
  ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, change, message):
  path = tmp_path / "bad.json"
  changed = change(json.loads(json.dumps(make().to_json())))
  text = changed if isinstance(changed, str) else json.dumps(changed)
  path.write_text(text)
  with pytest.raises(ValueError, match=rf"path must.*bad\.json.*{message}"):
    attention.load_calibration(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
  with pytest.raises(ValueError, match=r"path must.*nowhere\.json"):
    attention.load_calibration(tmp_path / "nowhere.json")


def tiny_model():
  config = models.DecoderConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    mlp_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_len=128,
  )
  return models.Decoder(config, rngs=nnx.Rngs(0))


def test_each_layer_of_a_model_attends_with_its_own():
  model = tiny_model()
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, 96)))
  first, second = (
    attention.SparseAttention(
      pattern=attention.Streaming(
        num_sink=0, num_local=n, block_q=16, block_kv=16
      )
    )
    for n in (1, 96)
  )
  layered = attention.LayeredAttention(layers=(first, second))

  class ByCall:
    """Counts calls, hence layers."""

    def __init__(self):
      self.calls = 0

    def __call__(self, *args, **where):
      self.calls += 1
      return (first, second)[self.calls - 1](*args, **where)

  def run(attention_fn, cache=None, **settings):
    @jax.jit
    def forward(tokens, cache):
      return model(tokens, cache=cache, attention_fn=attention_fn, **settings)

    return forward(tokens, cache)[0]

  expected = run(ByCall())
  helpers.assert_same(run(layered), expected, 1e-6)
  swapped = attention.LayeredAttention(layers=(second, first))
  assert helpers.relative_error(run(swapped), expected) > 1e-3
  helpers.assert_same(run(layered, remat=True), expected, 1e-6)
  calls = models.capture_qkv(model, tokens, attention_fn=layered)
  assert [c[0].shape for c in calls] == [(1, 96, 4, 8)] * 2
  cache = models.KVCache.init(model.config, batch=1, capacity=96)
  helpers.assert_same(run(layered, cache), expected, 1e-6)


def test_layers_of_another_model_are_refused():
  model = tiny_model()
  tokens = jnp.zeros((1, 8), jnp.int32)
  dense = attention.DenseAttention()
  one = attention.LayeredAttention(layers=(dense,))
  with pytest.raises(ValueError, match=r"layers must be one.*expected 2"):
    model(tokens, attention_fn=one)
  q, k, v = helpers.make_qkv(q_len=8)
  with pytest.raises(ValueError, match=r"layers must be told apart"):
    one(q, k, v)
  with pytest.raises(ValueError, match="layers must not be empty"):
    attention.LayeredAttention(layers=())
  assert jax.tree.leaves(one) == [one]  # static: no arrays inside
