# SPDX-License-Identifier: Apache-2.0
"""Writes a trained decoder as a folder in the Hugging Face layout."""

import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from unisparse_jax import models, records


def export(
  model: nnx.Module,
  folder: pathlib.Path | str,
  *,
  training_config: Any,
  tokenizer_file: pathlib.Path | str | None = None,
  metrics_file: pathlib.Path | str | None = None,
  summary: Mapping[str, Any] | None = None,
  extra: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Saves bfloat16 safetensors, config.json and how the model was made.

  Args:
    model: a decoder.
    folder: replaced whole when everything is written.
    training_config: written as training_config.json.
    tokenizer_file: copied as tokenizer.json.
    metrics_file: copied as metrics.jsonl.
    summary: written as evaluation.json.
    extra: more entries of config.json, such as eos_token_id.

  Returns:
    The folder.
  """
  folder = pathlib.Path(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
    new = pathlib.Path(temporary) / folder.name
    new.mkdir()
    models.save_hf(model, new, dtype=jnp.bfloat16, extra=dict(extra or {}))
    records.write_json(new / "training_config.json", training_config)
    for source, name in (
      (tokenizer_file, "tokenizer.json"),
      (metrics_file, "metrics.jsonl"),
    ):
      if source is not None:
        shutil.copyfile(source, new / name)
    if summary is not None:
      records.write_json(new / "evaluation.json", summary)
    if folder.exists():
      shutil.rmtree(folder)
    new.rename(folder)
  return folder
