# SPDX-License-Identifier: Apache-2.0
"""Decoder from and to a folder in the Hugging Face layout.

The folder holds `config.json` and `model.safetensors`, or shards listed in
`model.safetensors.index.json`. Needs the extra `hf`.
"""

import json
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from unisparse_jax.models import config as config_lib
from unisparse_jax.models import decoder, hf_config

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
# Derived from the settings; old checkpoints store it.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def load(
  path: str | os.PathLike,
  *,
  dtype: DTypeLike = jnp.float32,
  param_dtype: DTypeLike | None = None,
) -> decoder.Decoder:
  """Reads a Llama, Qwen2 or Qwen3 checkpoint.

  Args:
    path: folder with config.json and safetensors.
    dtype: of the activations.
    param_dtype: of the weights; default `dtype`.

  Returns:
    The decoder.

  Raises:
    ValueError: a file is missing, truncated or corrupt, or a tensor is
      missing, unknown or of the wrong shape; the message names it.
  """
  folder = pathlib.Path(path)
  config = load_config(folder)
  param_dtype = dtype if param_dtype is None else param_dtype
  # Shapes only: no random weights are made.
  model = nnx.eval_shape(
    lambda: decoder.Decoder(
      config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype
    )
  )
  params = {
    _hf_name(keys): (keys, param)
    for keys, param in nnx.to_flat_state(nnx.state(model))
  }
  files = _tensor_files(folder)
  ignored = {"lm_head.weight"} if config.tie_embeddings else set()
  loaded = {}
  for file, names in files.items():
    for name, tensor in _read(file, names):
      if name in ignored or name.endswith(_IGNORED_SUFFIX):
        continue
      if name not in params:
        raise ValueError(
          f"tensor {name!r} in {file} must belong to the model of {_CONFIG}; "
          "got an unknown name."
        )
      keys, param = params[name]
      if keys[-1] == "kernel":
        tensor = tensor.T  # stored [out_dim, in_dim]
      if tensor.shape != param.shape:
        raise ValueError(
          f"tensor {name!r} in {file} must have the shape that {_CONFIG} "
          f"implies; got {tensor.shape}; expected {param.shape} (as loaded)."
        )
      value = np.ascontiguousarray(tensor).astype(jnp.dtype(param_dtype))
      loaded[keys] = jnp.asarray(value)
  missing = [name for name, (keys, _) in params.items() if keys not in loaded]
  if missing:
    raise ValueError(
      f"path must hold every tensor of the model; got path={str(folder)!r} "
      f"without {missing[0]!r} and {len(missing) - 1} more."
    )
  graphdef, state = nnx.split(model)
  flat = nnx.to_flat_state(state)
  state = nnx.from_flat_state(
    [(keys, param.replace(loaded[keys])) for keys, param in flat]
  )
  return nnx.merge(graphdef, state)


def load_config(path: str | os.PathLike) -> config_lib.DecoderConfig:
  """Reads only the settings of a checkpoint; errors as `load`."""
  file = pathlib.Path(path) / _CONFIG
  try:
    return hf_config.from_dict(_read_json(file))
  except ValueError as error:
    if str(file) in str(error):
      raise
    raise ValueError(f"{error} (in {file})") from error


def save(
  model: decoder.Decoder,
  path: str | os.PathLike,
  *,
  dtype: DTypeLike | None = None,
  extra: dict[str, Any] | None = None,
  overwrite: bool = False,
):
  """Writes a decoder so that `load` and `transformers` can read it.

  Each file is written under a temporary name and then renamed.

  Args:
    model: the decoder.
    path: folder, made if it is not there.
    dtype: of the stored weights; default as they are.
    extra: more entries of config.json, such as eos_token_id.
    overwrite: whether a checkpoint in the folder may be replaced.

  Raises:
    ValueError: the folder holds a checkpoint, or no Hugging Face architecture
      has the model's settings.
  """
  from safetensors import numpy as safetensors_numpy

  folder = pathlib.Path(path)
  present = [
    name for name in (_WEIGHTS, _INDEX, _CONFIG) if (folder / name).exists()
  ]
  if present and not overwrite:
    raise ValueError(
      f"path must not hold a checkpoint; got path={str(folder)!r} with "
      f"{present[0]}. Use overwrite=True."
    )
  tensors = {}
  for keys, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    value = np.asarray(jax.device_get(param.get_value()))
    value = value if dtype is None else value.astype(jnp.dtype(dtype))
    value = value.T if keys[-1] == "kernel" else value
    tensors[_hf_name(keys)] = np.ascontiguousarray(value)
  stored = next(iter(tensors.values())).dtype.name
  values = dict(hf_config.to_dict(model.config, dtype=stored), **(extra or {}))
  weights = safetensors_numpy.save(tensors, metadata={"format": "pt"})
  text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"

  folder.mkdir(parents=True, exist_ok=True)
  _write_atomically(folder / _WEIGHTS, weights)
  _write_atomically(folder / _CONFIG, text.encode())
  (folder / _INDEX).unlink(missing_ok=True)


_LAYER_NAMES = {
  "attention_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
  "attention": "self_attn",
}


def _hf_name(keys: tuple) -> str:
  """Name of the tensor that holds the parameter at `keys`."""
  suffix = "bias" if keys[-1] == "bias" else "weight"
  match keys[:-1]:
    case ("embed",):
      parts = ["model", "embed_tokens"]
    case ("lm_head",):
      parts = ["lm_head"]
    case ("norm",):
      parts = ["model", "norm"]
    case ("layers", index, part, *rest):
      parts = ["model", "layers", str(index), _LAYER_NAMES.get(part, part)]
      parts += rest
    case _:
      raise AssertionError(f"no tensor name for parameter {keys}")
  return ".".join([*parts, suffix])


def _tensor_files(
  folder: pathlib.Path,
) -> Mapping[pathlib.Path, list[str] | None]:
  """Files to read and the tensors to take from each; None takes all."""
  if (folder / _WEIGHTS).is_file():
    return {folder / _WEIGHTS: None}
  index = folder / _INDEX
  if not index.is_file():
    raise ValueError(
      f"path must hold {_WEIGHTS} or {_INDEX}; got path={str(folder)!r}."
    )
  weight_map = _read_json(index).get("weight_map")
  if not isinstance(weight_map, dict):
    raise ValueError(f"{index} must have a weight_map; got {weight_map!r}.")
  files: dict[pathlib.Path, list[str]] = {}
  for name, file in weight_map.items():
    if pathlib.Path(file).name != file:
      raise ValueError(
        f"{index} must name files of its folder; got {name!r}: {file!r}."
      )
    files.setdefault(folder / file, []).append(name)
  return files


def _read(
  file: pathlib.Path, names: list[str] | None
) -> Iterator[tuple[str, np.ndarray]]:
  """Tensors of one safetensors file, one at a time."""
  import safetensors

  if not file.is_file():
    raise ValueError(f"{file} must exist; a tensor is listed in it.")
  try:
    opened = safetensors.safe_open(file, framework="numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{file} must be a complete safetensors file; got: {error}."
    ) from error
  with opened as tensors:
    available = set(tensors.keys())
    for name in sorted(available) if names is None else names:
      if name not in available:
        raise ValueError(f"{file} must hold {name!r}, which the index lists.")
      yield name, tensors.get_tensor(name)


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{file} must be a readable JSON file; got: {error}."
    ) from error
  if not isinstance(values, dict):
    raise ValueError(f"{file} must hold a JSON object; got {type(values)}.")
  return values


def _write_atomically(file: pathlib.Path, content: bytes):
  temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
  try:
    with temporary.open("wb") as stream:
      stream.write(content)
      stream.flush()
      os.fsync(stream.fileno())
    temporary.replace(file)
  finally:
    temporary.unlink(missing_ok=True)
