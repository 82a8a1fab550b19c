# SPDX-License-Identifier: Apache-2.0
"""Batches of all stages as one grain iterator that can be saved.

Element i of the data set is the batch of step i, whatever its stage, so one
set of worker processes serves the whole run, the number of workers does not
change any batch, and the next stage's batches are made ahead like any other.
"""

import functools
import importlib
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np

from unisparse_jax.training import config as config_lib

# `make_source(stage_index, stage)` gives random access to rows: source[i] is
# {"tokens": int32 [seq_len + 1], "loss_weights": float32 [seq_len + 1]}. With
# worker processes the source is pickled.
SourceFactory = Callable[[int, config_lib.Stage], Any]


_LOG = logging.getLogger(__name__)
_CLOSE_SECONDS = 5.0
_WATCH_SECONDS = 0.2
_NO_SHM = 1 << 40  # bytes; larger than any batch


class BatchIterator:
  """Iterates over device batches of steps `step`, `step + 1`, ...

  Args:
    config: its stages, num_workers and prefetch.
    make_source: gives the rows of a stage.
    step: first step, where no state is given.
    state: what `get_state` returned; continues after that batch.
  """

  def __init__(
    self,
    config: config_lib.TrainConfig,
    make_source: SourceFactory,
    *,
    step: int = 0,
    state: Mapping[str, Any] | None = None,
  ):
    self._num_workers = config.num_workers
    grain_state = None
    self._offset = step
    if state is not None and state["num_workers"] == config.num_workers:
      # The state of a pool of workers fits a pool of the same size only; any
      # other continues from the step.
      self._offset = state["offset"]
      grain_state = state["grain"]
    _mark_flags_parsed()
    batches = _batches(config.stages, make_source).slice(
      slice(self._offset, None)
    )
    # Workers live as long as this folder does.
    self._alive = tempfile.TemporaryDirectory(prefix="batches_")
    self._iterator = iter(_prefetched(batches, config, self._alive.name))
    if grain_state is not None:
      self._iterator.set_state(grain_state)

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, jax.Array]:
    """Next batch: tokens and loss_weights, [batch, seq_len + 1]."""
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """State after the last batch taken; can be written as JSON."""
    return {
      "grain": self._iterator.get_state(),
      "num_workers": self._num_workers,
      "offset": self._offset,
    }

  def start(self):
    """Lets the workers make their first batches before one is asked for."""
    self._iterator.start_prefetch()

  def close(self):
    """Ends worker processes, in the middle of a batch too, and threads.

    The library by itself waits for each worker's batch in turn, up to 25 s
    each. All of them are daemons, which do not outlive us.
    """
    self._alive.cleanup()
    closer = threading.Thread(target=self._iterator.close, daemon=True)
    closer.start()
    closer.join(_CLOSE_SECONDS)
    if closer.is_alive():
      _LOG.warning("the input workers are still busy; going on without them")


def _batches(stages, make_source) -> grain.MapDataset:
  parts = []
  for index, stage in enumerate(stages):
    source = make_source(index, stage)
    num_rows = stage.steps * stage.batch_size
    if len(source) < num_rows:
      raise ValueError(
        "make_source must give a source of at least steps * batch_size rows; "
        f"got len(source)={len(source)}, stage={index}; expected {num_rows}."
      )
    _check_row(source[0], index, stage)
    rows = grain.MapDataset.source(source).slice(slice(0, num_rows))
    parts.append(rows.batch(stage.batch_size, drop_remainder=True))
  return grain.MapDataset.concatenate(parts)


def _check_row(row, index: int, stage: config_lib.Stage):
  for name, dtype in (("tokens", np.int32), ("loss_weights", np.float32)):
    expected = (stage.seq_len + 1,)
    value = np.asarray(row[name])
    if value.shape != expected or value.dtype != dtype:
      raise ValueError(
        f"{name} of a row must be {np.dtype(dtype).name} {expected}; got "
        f"{value.dtype} {value.shape}, stage={index}."
      )


def _prefetched(
  batches: grain.MapDataset, config: config_lib.TrainConfig, alive: str
) -> grain.IterDataset:
  if config.num_workers:
    dataset = batches.to_iter_dataset(
      grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ).mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=config.num_workers,
        per_worker_buffer_size=config.prefetch,
      ),
      worker_init_fn=functools.partial(_start_worker, alive=alive),
    )
    # Batches of a few MB go through pipes: on a CPU device a JAX array would
    # hold on to a shared memory block past the end of the process.
    dataset = grain.experimental.WithOptionsIterDataset(
      dataset, grain.experimental.DatasetOptions(min_shm_size=_NO_SHM)
    )
  else:
    dataset = batches.to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch)
    )
  # A thread copies batches to the device while the step before them runs.
  return grain.experimental.ThreadPrefetchIterDataset(
    dataset.map(jax.device_put), prefetch_buffer_size=2
  )


def _mark_flags_parsed():
  """Lets grain read its own absl flags in a program that is no absl main."""
  flags = importlib.import_module("absl.flags").FLAGS
  if not flags.is_parsed():
    flags.mark_as_parsed()


def _start_worker(worker_index: int, num_workers: int, *, alive: str):
  """Keeps JAX off the accelerator, and ends the process with a folder."""
  del worker_index, num_workers

  def watch():
    while os.path.exists(alive):
      time.sleep(_WATCH_SECONDS)
    os._exit(1)  # 0 would leave the parent waiting for more.

  threading.Thread(target=watch, daemon=True).start()
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  if (
    "jax" in sys.modules
  ):  # Imported by the main module: too late for os.environ.
    sys.modules["jax"].config.update("jax_platforms", "cpu")
