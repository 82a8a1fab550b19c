# SPDX-License-Identifier: Apache-2.0
"""Documentation text out of Python sources: signatures and docstrings."""

from __future__ import annotations

import ast
import inspect

_MIN_CHARS = 60  # shorter docstrings say nothing of their own


def module_docs(name: str, source: str) -> str:
  """The documentation of one module, as plain text.

  Args:
    name: path of the module, such as "json/decoder.py".
    source: its code.

  Returns:
    The module's docstring, then every documented class and function with its
    signature; "" where little is documented or the source does not parse.
  """
  try:
    tree = ast.parse(source)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return ""
  title = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
  parts = [f"{title}\n{'=' * len(title)}\n"]
  if text := _docstring(tree):
    parts.append(text + "\n")
  _add(tree, "", parts)
  result = "\n".join(parts)
  return result + "\n" if len(result) >= len(title) + 4 * _MIN_CHARS else ""


def _add(node: ast.AST, prefix: str, parts: list[str]):
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.ClassDef):
      signature = f"class {prefix}{child.name}"
      if child.bases:
        signature += f"({', '.join(map(_unparse, child.bases))})"
    elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
      signature = f"{prefix}{child.name}({_unparse(child.args)})"
    else:
      continue
    text = _docstring(child)
    if len(text) >= _MIN_CHARS:
      indented = "\n".join(
        f"    {line}" if line else "" for line in text.split("\n")
      )
      parts.append(f"{signature}\n{indented}\n")
    if isinstance(child, ast.ClassDef):
      _add(child, f"{prefix}{child.name}.", parts)


def _docstring(node) -> str:
  text = ast.get_docstring(node, clean=False)
  return inspect.cleandoc(text).strip() if text else ""


def _unparse(node: ast.AST) -> str:
  try:
    return ast.unparse(node)
  except (ValueError, RecursionError, AttributeError):
    return "..."
