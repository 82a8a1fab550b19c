# SPDX-License-Identifier: Apache-2.0
"""A draft head as two files: weights as safetensors, settings as JSON.

What the head shares with its target, such as the embedding, is not stored. The
files may lie beside the target's own.
"""

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

WEIGHTS, SETTINGS = "draft_head.safetensors", "draft_head.json"
_FORMAT = "unisparse_jax.eagle_head.2"
_FLAGS = (
  "tap_layers",
  "mlp_dim",
  "norm_before_fusion",
  "feed_back_normed",
  "share_output",
)
_SIZES = ("vocab_size", "num_layers", "embed_dim", "num_heads", "head_dim")


def save_head(
  head: eagle_head.EagleHead,
  folder: pathlib.Path | str,
  *,
  dtype: DTypeLike = jnp.bfloat16,
  about: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Writes the weights that are a head's own, and its settings.

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
    if not head.config.is_shared(name.split(".")[0])
  }
  temporary = folder / (WEIGHTS + ".tmp")
  safetensors.save_file(arrays, temporary)
  temporary.replace(folder / WEIGHTS)
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
  (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
  return folder


def load_head(
  folder: pathlib.Path | str,
  target: models.Decoder,
  *,
  dtype: DTypeLike | None = None,
  param_dtype: DTypeLike | None = None,
) -> eagle_head.EagleHead:
  """Reads what `save_head` wrote.

  Args:
    folder: with the head's two files.
    target: the decoder that it drafts for.
    dtype: of the activations; default the target's.
    param_dtype: of the weights; default dtype.

  Raises:
    ValueError: no head is there, or it was made for another target.
  """
  folder = pathlib.Path(folder)
  if not (folder / SETTINGS).is_file():
    raise ValueError(
      f"folder must hold a draft head; got folder={folder} without {SETTINGS}."
    )
  found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
  checks.require(
    found.get("format") == _FORMAT,
    "format",
    "be one that this version reads",
    found.get("format"),
    _FORMAT,
  )
  sizes = {name: getattr(target.config, name) for name in _SIZES}
  checks.require(
    found["target"] == sizes,
    "head",
    "be made for this target",
    found["target"],
    str(sizes),
  )
  settings = {**found["head"], "tap_layers": tuple(found["head"]["tap_layers"])}
  config = eagle_head.EagleHeadConfig(target=target.config, **settings)
  dtype = target.dtype if dtype is None else dtype
  head = eagle_head.EagleHead.from_target(
    target,
    config=config,
    rngs=nnx.Rngs(0),
    dtype=dtype,
    param_dtype=dtype if param_dtype is None else param_dtype,
  )
  arrays = safetensors.load_file(folder / WEIGHTS)
  graphdef, state = nnx.split(head)
  leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
  new = []
  for path, leaf in leaves:
    name = _name(path)
    if config.is_shared(name.split(".")[0]):
      new.append(leaf)
      continue
    checks.require(
      arrays[name].shape == leaf.shape,
      name,
      "have the shape of the head's settings",
      arrays[name].shape,
      str(leaf.shape),
    )
    new.append(jnp.asarray(arrays[name]).astype(leaf.dtype))
  return nnx.merge(graphdef, jax.tree.unflatten(treedef, new))


def _flat(head) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(head))
  return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
  parts = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
  return ".".join(part for part in parts if part != "value")
