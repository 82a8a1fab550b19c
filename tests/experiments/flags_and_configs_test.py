# SPDX-License-Identifier: Apache-2.0
import dataclasses
import enum

import ml_collections
import pytest

from experiments.frame import flags_and_configs


class Shape(enum.Enum):
  ROUND = "round"
  SQUARE = "square"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  size: int
  shape: Shape = Shape.ROUND


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
  parts: tuple[Part, ...]
  sizes: tuple[int, ...] = ()
  spare: Part | None = None
  name: str = "a"


def test_nested_values_are_built():
  config = ml_collections.ConfigDict()
  config.parts = (dict(size=1), dict(size=2, shape="square"))
  config.sizes = [3, 4]
  config.spare = dict(size=5)
  assert flags_and_configs.to_dataclass(Whole, config, name="config") == Whole(
    parts=(Part(size=1), Part(size=2, shape=Shape.SQUARE)),
    sizes=(3, 4),
    spare=Part(size=5),
  )
  plain = {"parts": [], "spare": None}
  built = flags_and_configs.to_dataclass(Whole, plain, name="config")
  assert built == Whole(parts=())


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"parts": (), "colour": 1}, r"config must.*unknown \['colour'\]"),
    ({}, r"config must.*Whole; got none for \['parts'\]"),
    ({"parts": ({"sizes": 1},)}, r"config\.parts\[0\] must.*\['sizes'\]"),
    (
      {"parts": ({"size": 1, "shape": "oval"},)},
      r"config\.parts\[0\]\.shape must be one of \['round', 'square'\]",
    ),
  ],
)
def test_bad_keys_and_values_are_named(config, message):
  with pytest.raises(ValueError, match=message):
    flags_and_configs.to_dataclass(Whole, config, name="config")
