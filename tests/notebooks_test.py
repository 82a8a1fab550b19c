# SPDX-License-Identifier: Apache-2.0
"""What notebooks import and name is there; running them takes minutes."""

import ast
import importlib
import json
import pathlib
import types

import pytest

NOTEBOOKS = sorted(
  (pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb")
)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_exist(path):
  cells = json.loads(path.read_text())["cells"]
  assert not any(cell.get("outputs") for cell in cells), "stored without output"
  code = "\n".join(
    "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"
  )
  tree = ast.parse(code)
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for name in node.names:
        module = importlib.import_module(name.name)
        found[name.asname or name.name.split(".")[0]] = (
          module
          if name.asname
          else importlib.import_module(name.name.split(".")[0])
        )
    elif isinstance(node, ast.ImportFrom):
      assert node.module is not None
      module = importlib.import_module(node.module)
      for name in node.names:
        if not hasattr(module, name.name):
          importlib.import_module(f"{node.module}.{name.name}")
        found[name.asname or name.name] = getattr(module, name.name)
  checked = 0
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      checked += _resolve(node, found) is not None
  assert checked >= 5


def _resolve(node, found):
  """The module or member that a dotted name stands for; None for values."""
  if isinstance(node, ast.Name):
    return found.get(node.id)
  if not isinstance(node, ast.Attribute):
    return None
  owner = _resolve(node.value, found)
  if not isinstance(owner, types.ModuleType):
    return None
  assert hasattr(owner, node.attr), f"{owner.__name__} has no {node.attr}"
  return getattr(owner, node.attr)
