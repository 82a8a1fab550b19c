# SPDX-License-Identifier: Apache-2.0
"""Another attention in each layer, and the file that a calibration writes."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from pallas_kernels import checks, dispatch
from unisparse_jax.attention import attention_fn, selector

FORMAT = "unisparse_jax.calibration.1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayeredAttention:
  """An attention for each layer of a model, passed as any other attention.

  Attributes:
    layers: one attention a layer.
  """

  layers: tuple[attention_fn.AttentionFn, ...]

  def __post_init__(self):
    checks.require(len(self.layers) > 0, "layers", "not be empty", self.layers)

  def for_layer(self, layer: int, num_layers: int) -> attention_fn.AttentionFn:
    """The attention of one layer of a model with `num_layers`."""
    checks.require(
      len(self.layers) == num_layers,
      "layers",
      "be one attention for each layer of the model",
      len(self.layers),
      str(num_layers),
    )
    return self.layers[layer]

  def __call__(self, q, k, v, **unused):
    raise ValueError(
      "layers must be told apart by the caller; got a LayeredAttention called "
      "as the attention of one layer; expected attention.for_layer(...)."
    )


def for_layer(
  attention: attention_fn.AttentionFn, layer: int, num_layers: int
) -> attention_fn.AttentionFn:
  """What a layer attends with: its own of a layered attention, else the same.

  Args:
    attention: any attention; one with a method `for_layer` is layered.
    layer: index of the layer.
    num_layers: layers of the model.

  Raises:
    ValueError: an attention for another number of layers.
  """
  find = getattr(attention, "for_layer", None)
  return attention if find is None else find(layer, num_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """Settings of a pattern by layer and head, found on a model.

  Attributes:
    pattern: name in `selector.PATTERNS`.
    settings: what all layers share.
    layers: what each layer has of its own.
    model_sha256: start of the hash of the weights that it was found on.
    target: what was aimed at, such as {"recall": 0.95}.
    dense_below: calls with fewer keys use dense attention.
    evidence: what was measured; not used.
  """

  pattern: str
  settings: Mapping[str, Any]
  layers: tuple[Mapping[str, Any], ...]
  model_sha256: str
  target: Mapping[str, Any]
  dense_below: int = 0
  evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def patterns(self) -> tuple[selector.Pattern, ...]:
    """The pattern of each layer; ValueError for a bad setting."""
    return tuple(
      selector.make_pattern(
        self.pattern, **_tuples({**self.settings, **settings})
      )
      for settings in self.layers
    )

  def attention(
    self, *, implementation: dispatch.Implementation = None
  ) -> LayeredAttention:
    """The attention that it describes."""
    return LayeredAttention(
      layers=tuple(
        attention_fn.SparseAttention(
          pattern=pattern,
          dense_below=self.dense_below,
          implementation=implementation,
        )
        for pattern in self.patterns()
      )
    )

  def to_json(self) -> dict[str, Any]:
    """What `load_calibration` reads, for `records.write_json`."""
    return {"format": FORMAT, **vars(self)}


def load_calibration(
  path: pathlib.Path | str, *, model_sha256: str | None = None
) -> Calibration:
  """Reads what `experiments.calibrate` or `calibrate_answers` wrote.

  Args:
    path: the JSON file.
    model_sha256: hash of the weights that it shall be for; None: any.

  Returns:
    The calibration, its patterns checked.

  Raises:
    ValueError: the file is no calibration, or for other weights; the message
      names the file.
  """

  def fail(reason: str):
    return ValueError(
      f"path must be a calibration file; got path={str(path)!r}: {reason}."
    )

  try:
    values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise fail(str(error)) from error
  if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
    raise fail(f"it does not say that its format is {FORMAT}")
  known = {f.name for f in dataclasses.fields(Calibration)}
  if values.keys() != known:
    raise fail(f"keys differ: {sorted(values.keys() ^ known)}")
  for name, kind in (
    ("pattern", str),
    ("settings", dict),
    ("layers", list),
    ("model_sha256", str),
    ("target", dict),
    ("dense_below", int),
    ("evidence", dict),
  ):
    if not isinstance(values[name], kind):
      raise fail(f"{name} is no {kind.__name__}")
  if not values["layers"] or not all(
    isinstance(layer, dict) for layer in values["layers"]
  ):
    raise fail("layers are no objects")
  calibration = Calibration(**values | {"layers": tuple(values["layers"])})
  try:
    calibration.attention()
  except (TypeError, ValueError) as error:
    raise fail(str(error)) from error
  if model_sha256 is not None and model_sha256 != calibration.model_sha256:
    raise fail(
      f"it is for weights {calibration.model_sha256}, not {model_sha256}"
    )
  return calibration


def _tuples(value: Any) -> Any:
  """Lists of JSON as tuples, which are hashable."""
  if isinstance(value, Mapping):
    return {key: _tuples(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return tuple(_tuples(item) for item in value)
  return value
