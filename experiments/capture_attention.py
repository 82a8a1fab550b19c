# SPDX-License-Identifier: Apache-2.0
"""Saves what attention sees in a real prompt: q, k and v of chosen layers.

Speed depends on the mask, and a mask of random numbers is none that occurs. For
each length of the config a prompt of a task, filled up in front with held-out
code, goes through the model with dense attention. Writes, for each layer,
WORKDIR/LENGTH_LAYER.safetensors with q [1, length, num_heads, head_dim], k and
v [1, length, num_kv_heads, head_dim], after RoPE, k and v unrepeated; and a
line in WORKDIR/records.jsonl. `experiments.attention_speed` reads the folder.

The same command goes on where an earlier one stopped.
"""

import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from safetensors import numpy as safetensors_numpy

from experiments import long_context
from experiments.frame import flags_and_configs, runs
from experiments.prefill import long_context_config, long_context_run
from pallas_kernels import checks
from unisparse_jax import attention, models, tasks
from unisparse_jax.attention import dense

_CONFIG, _WORKDIR = flags_and_configs.define()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureConfig:
  """What is captured.

  Attributes:
    model: folder of a checkpoint, or the name of one that ships.
    task: whose prompt; "": held-out code alone.
    lengths: tokens.
    layers: of the model.
    dense_implementation: how the layers attend.
    dtype: of weights and activations, and of what is written.
    seed: of the prompt.
  """

  model: str
  task: str
  lengths: tuple[int, ...]
  layers: tuple[int, ...]
  dense_implementation: str = "tiled"
  dtype: str = "bfloat16"
  seed: int = 0

  def __post_init__(self):
    if self.task:
      checks.check_choice("task", self.task, tasks.TASKS)
    for name in ("lengths", "layers"):
      values = getattr(self, name)
      checks.require(
        len(values) > 0 and len(set(values)) == len(values),
        name,
        "not be empty and name nothing twice",
        values,
      )
    for length in self.lengths:
      checks.check_positive_int("lengths", length)
    for layer in self.layers:
      checks.check_non_negative_int("layers", layer)
    checks.check_choice(
      "dense_implementation", self.dense_implementation, dense.IMPLEMENTATIONS
    )
    checks.check_choice("dtype", self.dtype, ("float32", "bfloat16"))
    checks.check_non_negative_int("seed", self.seed)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = flags_and_configs.to_dataclass(
    CaptureConfig, _CONFIG.value, name="config"
  )
  console = long_context.make_console()
  for line in capture(config, _WORKDIR.value):
    console.print(line, markup=False, soft_wrap=True)


def capture(config: CaptureConfig, workdir: str):
  """Writes the files that a workdir lacks; yields a line for each length.

  Raises:
    ValueError: the settings do not fit the model, or the folder is not this
      run's.
  """
  folder = long_context_config.model_folder(config.model)
  model_config = models.load_hf_config(folder)
  checks.require(
    max(config.layers) < model_config.num_layers,
    "layers",
    "be layers of the model",
    config.layers,
    f"below {model_config.num_layers}",
  )
  checks.require(
    max(config.lengths) <= model_config.max_len,
    "lengths",
    "not exceed the model's max_len",
    config.lengths,
    f"<= {model_config.max_len}",
  )
  settings = dataclasses.asdict(config)
  settings["model_sha256"] = long_context_config.weights_hash(folder)
  run = runs.begin(workdir, settings)
  path = run.workdir
  missing = {
    length: [
      layer
      for layer in config.layers
      if not _file(path, length, layer).exists()
    ]
    for length in config.lengths
  }
  if not any(missing.values()):
    return
  corpus = long_context_run.held_out_code(folder, path)
  model = models.load_hf(folder, dtype=jnp.dtype(config.dtype))
  stacked = models.stack_layers(model)
  dense_fn = attention.DenseAttention(
    implementation=config.dense_implementation
  )
  fn, budgets = attention.budgeted(
    dense_fn,
    num_layers=model_config.num_layers,
    num_heads=model_config.num_heads,
    num_kv_heads=model_config.num_kv_heads,
  )
  for length, layers in missing.items():
    if not layers:
      continue
    text = long_context_run.full_row(
      corpus, config.task, seed=config.seed, length=length
    )
    found = models.scanned_prefill(
      model,
      stacked,
      jnp.asarray(text, jnp.int32)[None],
      jnp.asarray([length], jnp.int32),
      budgets,
      attention_fn=fn,
      capacity=length,
      keep_q=True,
    )
    assert found.q is not None, "asked for"
    for layer in layers:
      arrays = {
        name: np.asarray(x[layer])
        for name, x in (("q", found.q), ("k", found.k), ("v", found.v))
      }
      file = _file(path, length, layer)
      _save(file, arrays)
      run.writer.write(
        kind="captured",
        length=length,
        layer=layer,
        file=file.name,
        bytes=file.stat().st_size,
        sha256=long_context_config.file_hash(file),
      )
    yield f"{length:,} tokens: layers {', '.join(map(str, layers))} in {path}"


def load(
  folder: pathlib.Path | str, length: int, layer: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """q, k and v of a captured layer, on the device.

  Raises:
    ValueError: that length and layer was not captured there.
  """
  file = _file(pathlib.Path(folder), length, layer)
  checks.require(
    file.is_file(), "captured", "hold that length and layer", str(file)
  )
  arrays = safetensors_numpy.load_file(file)
  q, k, v = (jnp.asarray(arrays[name]) for name in ("q", "k", "v"))
  return q, k, v


def found_in(folder: pathlib.Path | str) -> list[tuple[int, int]]:
  """(length, layer) of all that a folder holds, in order."""
  pairs = [
    tuple(int(x) for x in file.stem.split("_"))
    for file in pathlib.Path(folder).glob("*_*.safetensors")
  ]
  return sorted((length, layer) for length, layer in pairs)


def _file(folder: pathlib.Path, length: int, layer: int) -> pathlib.Path:
  return folder / f"{length}_{layer}.safetensors"


def _save(file: pathlib.Path, arrays: dict[str, Any]):
  """Writes beside the file, then renames: never half a file."""
  with tempfile.NamedTemporaryFile(
    dir=file.parent, prefix="part", delete=False
  ) as temporary:
    temporary.close()
    safetensors_numpy.save_file(arrays, temporary.name)
  os.replace(temporary.name, file)


if __name__ == "__main__":
  flags_and_configs.run(main)
