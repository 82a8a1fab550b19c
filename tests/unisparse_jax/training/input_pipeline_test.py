# SPDX-License-Identifier: Apache-2.0
import json
import multiprocessing
import os
import sys
import time

import numpy as np
import pytest

from tests.unisparse_jax.training import tiny_run
from unisparse_jax.training import input_pipeline


def take(batches, count):
  return [
    {name: np.asarray(x) for name, x in next(batches).items()}
    for _ in range(count)
  ]


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x["tokens"], y["tokens"])
    np.testing.assert_array_equal(x["loss_weights"], y["loss_weights"])


@pytest.fixture
def make_batches():
  """BatchIterator that is closed when the test ends."""
  made = []

  def make(config, source=tiny_run.make_source, **kwargs):
    made.append(input_pipeline.BatchIterator(config, source, **kwargs))
    return made[-1]

  yield make
  for batches in made:
    batches.close()


def test_batches_are_the_rows_of_each_stage_in_order(make_batches):
  config = tiny_run.make_config()
  batches = take(make_batches(config), 15)
  expected = tiny_run.Rows(0, 16)
  for step in range(8):
    rows = [expected[4 * step + i]["tokens"] for i in range(4)]
    np.testing.assert_array_equal(batches[step]["tokens"], rows)
  expected = tiny_run.Rows(1, 32)
  for step in range(7):
    rows = [expected[2 * step + i]["loss_weights"] for i in range(2)]
    np.testing.assert_array_equal(batches[8 + step]["loss_weights"], rows)


def test_iterator_ends_with_the_last_stage(make_batches):
  batches = make_batches(tiny_run.make_config(), step=14)
  take(batches, 1)
  with pytest.raises(StopIteration):
    next(batches)


def test_state_is_json_and_goes_on_after_the_batch_taken(make_batches):
  config = tiny_run.make_config()
  whole = take(make_batches(config), 15)
  first = make_batches(config)
  assert_same(take(first, 6), whole[:6])  # more are prefetched already
  state = json.loads(json.dumps(first.get_state()))
  second = make_batches(config, step=6, state=state)
  assert_same(take(second, 4), whole[6:10])
  third = make_batches(config, step=10, state=second.get_state())
  assert_same(take(third, 5), whole[10:])


class Spying(tiny_run.Rows):
  """Puts what a worker process looks like into its rows."""

  def __getitem__(self, index):
    row = super().__getitem__(index)
    backends = {}
    if "jax" in sys.modules:
      backends = sys.modules["jax._src.xla_bridge"]._backends
    row["tokens"][0] = os.getpid() != self.main
    row["tokens"][1] = os.environ.get("JAX_PLATFORMS") == "cpu"
    row["tokens"][2] = len(backends)
    return row


def make_spying(index, stage):
  source = Spying(index, stage.seq_len)
  source.main = os.getpid()
  return source


@pytest.mark.slow
def test_worker_processes_start_no_jax_backend(make_batches, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  config = tiny_run.make_config(num_workers=1)
  (batch,) = take(make_batches(config, make_spying), 1)
  assert batch["tokens"][0, :3].tolist() == [1, 1, 0]


class Short(tiny_run.Rows):
  def __len__(self):
    return 31


class Misshapen(tiny_run.Rows):
  def __getitem__(self, index):
    row = super().__getitem__(index)
    return row | {"tokens": row["tokens"].astype(np.int64)}


class SlowRows(tiny_run.Rows):
  """Takes a minute for every row but the first ones."""

  def __getitem__(self, index):
    if index >= 8:
      time.sleep(60.0)
    return super().__getitem__(index)


def test_busy_workers_are_not_waited_for():
  config = tiny_run.make_config(num_workers=2)
  batches = input_pipeline.BatchIterator(
    config, lambda index, stage: SlowRows(index, stage.seq_len)
  )
  take(batches, 2)
  processes = multiprocessing.active_children()
  start = time.monotonic()
  batches.close()
  assert time.monotonic() - start < 4.0
  for process in processes:
    process.join(4.0)
    assert not process.is_alive()


@pytest.mark.parametrize(
  ("source", "message"),
  [
    (Short, r"len\(source\)=31, stage=0; expected 32"),
    (Misshapen, r"tokens of a row must be int32 \(17,\); got int64"),
  ],
)
def test_bad_source_is_refused(source, message):
  with pytest.raises(ValueError, match=message):
    input_pipeline.BatchIterator(
      tiny_run.make_config(), lambda index, stage: source(index, stage.seq_len)
    )
