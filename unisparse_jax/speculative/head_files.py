# SPDX-License-Identifier: Apache-2.0
"""A draft head as a folder: weights as safetensors, settings as JSON."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import numpy as safetensors

from pallas_kernels import checks
from unisparse_jax import models
from unisparse_jax.speculative import eagle_head

_FORMAT = "unisparse_jax.eagle_head.1"
_WEIGHTS, _SETTINGS = "head.safetensors", "head.json"
_FLAGS = ("tap_layers", "mlp_dim", "norm_before_fusion", "feed_back_normed")
_SIZES = ("vocab_size", "num_layers", "embed_dim", "num_heads", "head_dim")


def save_head(
  head: eagle_head.EagleHead,
  folder: pathlib.Path | str,
  *,
  dtype: DTypeLike = jnp.bfloat16,
  about: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Writes a head's weights and settings.

  Args:
    head: the head.
    folder: created if missing.
    dtype: of the weights on disk.
    about: how it was made; JSON.

  Returns:
    The folder.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {
    name: np.asarray(jax.device_get(x).astype(dtype))
    for name, x in _flat(head).items()
  }
  temporary = folder / (_WEIGHTS + ".tmp")
  safetensors.save_file(arrays, temporary)
  temporary.replace(folder / _WEIGHTS)
  settings = {name: getattr(head.config, name) for name in _FLAGS}
  target = {name: getattr(head.config.target, name) for name in _SIZES}
  text = json.dumps(
    {
      "format": _FORMAT,
      "head": settings,
      "target": target,
      "about": dict(about or {}),
    },
    indent=2,
  )
  (folder / _SETTINGS).write_text(text + "\n", encoding="utf-8")
  return folder


def load_head(
  folder: pathlib.Path | str,
  target: models.DecoderConfig,
  *,
  dtype: DTypeLike = jnp.float32,
  param_dtype: DTypeLike | None = None,
) -> eagle_head.EagleHead:
  """Reads what `save_head` wrote.

  Args:
    folder: with the head's two files.
    target: of the decoder that it drafts for.
    dtype: of the activations.
    param_dtype: of the weights; default dtype.

  Raises:
    ValueError: no head is there, or it was made for another target.
  """
  folder = pathlib.Path(folder)
  if not (folder / _SETTINGS).is_file():
    raise ValueError(
      f"folder must hold a draft head; got folder={folder} without {_SETTINGS}."
    )
  found = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
  checks.require(
    found.get("format") == _FORMAT,
    "format",
    "be one that this version reads",
    found.get("format"),
    _FORMAT,
  )
  sizes = {name: getattr(target, name) for name in _SIZES}
  checks.require(
    found["target"] == sizes,
    "head",
    "be made for this target",
    found["target"],
    str(sizes),
  )
  settings = {**found["head"], "tap_layers": tuple(found["head"]["tap_layers"])}
  config = eagle_head.EagleHeadConfig(target=target, **settings)
  head = eagle_head.EagleHead(
    config,
    rngs=nnx.Rngs(0),
    dtype=dtype,
    param_dtype=dtype if param_dtype is None else param_dtype,
  )
  arrays = safetensors.load_file(folder / _WEIGHTS)
  graphdef, state = nnx.split(head)
  leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
  new = []
  for path, leaf in leaves:
    array = arrays[_name(path)]
    checks.require(
      array.shape == leaf.shape,
      _name(path),
      "have the shape of the head's settings",
      array.shape,
      str(leaf.shape),
    )
    new.append(jnp.asarray(array).astype(leaf.dtype))
  return nnx.merge(graphdef, jax.tree.unflatten(treedef, new))


def _flat(head) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(head))
  return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
  parts = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
  return ".".join(part for part in parts if part != "value")
