# SPDX-License-Identifier: Apache-2.0
"""A head learns what a target writes, and a stopped run goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unisparse_jax import models, training
from unisparse_jax.training import head_batches

CONFIG = models.DecoderConfig(
  vocab_size=32,
  num_layers=2,
  embed_dim=16,
  mlp_dim=24,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  max_len=64,
)


@pytest.fixture(scope="module")
def target():
  model = models.Decoder(CONFIG, rngs=nnx.Rngs(0))
  # Distinct logits: an untrained model writes one token for ever.
  graphdef, state = nnx.split(model)
  state = jax.tree.map(lambda x: x * 6.0 if x.ndim == 2 else x, state)
  return nnx.merge(graphdef, state)


@pytest.fixture(scope="module")
def groups(target):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(3, 32, n) for n in (4, 6, 5, 6)]
  tokens, starts, ends = training.write_texts(
    target, prompts, prompt_len=6, new_tokens=18,
    temperatures=np.zeros(4), rng_key=jax.random.key(0), eos_id=2,
  )  # fmt: skip
  group = training.TextGroup(
    tokens=tokens.astype(np.uint16),
    starts=starts,
    ends=ends,
    labels=np.zeros(4, np.int32),
  )
  return {"short": group}


def make_config(**changes):
  settings = dict(
    steps=50, batch_tokens=96, num_unrolled=2, learning_rate=1e-2,
    dtype="float32", attention="xla", held_out=0.0, log_every=20,
    checkpoint_every=20, clip_norm=1.0,
  )  # fmt: skip
  return training.HeadTrainConfig(**(settings | changes))


def test_texts_are_what_the_model_writes(target, groups):
  group = groups["short"]
  for row, start, end in zip(
    group.tokens.astype(np.int32), group.starts, group.ends, strict=True
  ):
    alone = models.generate(
      target, row[None, :start], max_new_tokens=18, eos_id=2
    )
    np.testing.assert_array_equal(row[start:end], alone[0, : end - start])
    assert end == start + 18 or row[end - 1] == 2
  batch = group.take(np.array([1]))
  np.testing.assert_array_equal(
    np.flatnonzero(batch["weights"][0]),
    np.arange(group.starts[1], group.ends[1]),
  )


def test_temperatures_differ_by_row(target):
  prompts = [np.array([5, 6, 7])] * 4
  tokens, _, _ = training.write_texts(
    target, prompts, prompt_len=6, new_tokens=18,
    temperatures=np.array([0.0, 0.0, 4.0, 4.0]),
    rng_key=jax.random.key(1), eos_id=2,
  )  # fmt: skip
  np.testing.assert_array_equal(tokens[0], tokens[1])
  assert np.any(tokens[2] != tokens[3])
  assert np.any(tokens[0] != tokens[2])


def test_overfits_one_batch(target, groups, tmp_path):
  whole = training.train_head(
    make_config(), target, groups, tmp_path / "whole", show_progress=False
  )
  found = whole.evaluation["short"]
  assert min(found["accuracy"]) > 0.95
  assert found["tau"] > 2.7  # of at most 3
  assert whole.reason == "finished"
  # Frozen: still the target's.
  np.testing.assert_array_equal(
    whole.head.embed.embedding[...], target.embed.embedding[...]
  )
  assert np.any(
    whole.head.lm_head.embedding[...] != target.embed.embedding[...]
  )
  lines = training.read_metrics(tmp_path / "whole" / "metrics.jsonl")
  first = next(line for line in lines if line["kind"] == "train")
  assert {"loss_0", "accuracy_1", "hit_rate_1", "tau", "ece"} <= first.keys()

  with pytest.raises(ValueError, match=r"train\.decay is"):
    training.train_head(
      make_config(decay=0.5), target, groups, tmp_path / "whole",
      show_progress=False,
    )  # fmt: skip


def test_batches_depend_on_the_step_alone(groups):
  two = {"a": groups["short"], "b": groups["short"]}
  config = make_config(steps=12, batch_tokens=48)
  batches = head_batches.Batches(two, config)
  again = head_batches.Batches(two, config)
  names = [batches[i][0] for i in range(12)]
  assert names.count("a") == names.count("b") == 6
  for i in (11, 3, 7):
    name, batch = batches[i]
    assert name == again[i][0]
    np.testing.assert_array_equal(batch["tokens"], again[i][1]["tokens"])
  # Two batches a group make an epoch: every row once.
  rows = [batches[i][1]["tokens"] for i in range(12) if names[i] == "a"][:2]
  assert len(np.unique(np.concatenate(rows), axis=0)) == 4
  with pytest.raises(ValueError, match="texts of a must fill a batch"):
    head_batches.Batches(two, make_config(batch_tokens=24 * 5))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"steps": 0}, "steps must be"),
    ({"decay": 0.0}, "decay must be"),
    ({"dtype": "float16"}, "dtype must be"),
    ({"max_seconds": -1.0}, "max_seconds must be"),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make_config(**changes)


def test_groups_survive_a_file(groups, tmp_path):
  training.save_groups(groups, tmp_path / "texts", {"seed": 0})
  found = training.load_groups(tmp_path / "texts")["short"]
  assert found.num_written == groups["short"].num_written
  np.testing.assert_array_equal(found.tokens, groups["short"].tokens)
  with pytest.raises(ValueError, match="folder must hold texts"):
    training.load_groups(tmp_path)
  assert isinstance(jnp.asarray(found.starts), jax.Array)
