# SPDX-License-Identifier: Apache-2.0
"""Facts of a Python source that a question can ask for, found with `ast`.

Only facts that stand on one line are kept, so that the answer is literally in
the text: the argument list of a function, its defaults, the value of a module
constant, the bases of a class.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import re
import warnings


class FactKind(enum.IntEnum):
  """What a fact states; the answer as it stands in the source."""

  FUNCTION = 0  # module-level `def name(...)`: "(...)"
  METHOD = 1  # `def name(...)` in class `qualifier`: "(...)"
  CONSTANT = 2  # module-level `name = literal`: "literal"
  BASES = 3  # module-level `class name(...)`: "(...)"
  DEFAULT = 4  # `name=literal` among the arguments of `qualifier`: "literal"
  OPAQUE = 5  # a name that is defined, with no answer to ask for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
  """One fact.

  Attributes:
    kind: what it states.
    line: index of its line in the source, counting all lines from 0.
    scope_line: line of the class or function named by `qualifier`, else `line`.
    qualifier: class of a method, function of a default, else "".
    name: what the question asks about.
    answer: text that follows the name in the source; "" for OPAQUE.
  """

  kind: FactKind
  line: int
  scope_line: int
  qualifier: str
  name: str
  answer: str


_MAX_ANSWER = 72
# One pattern for all names: compiling one for each took a fifth of the time.
_DEF = re.compile(r"\s*(?:async )?def (\w+)(?=\()")
_CLASS = re.compile(r"class (\w+)(?=\()")
_CONSTANT = re.compile(r"(\w+) = (.+?)\s*")
_COMMON_VALUES = ("None", "True", "False")  # could be guessed
_LITERAL = re.compile(r"""[-+]?\w[\w.]*|'[^'\\]*'|"[^"\\]*\"""", re.ASCII)


def parse(text: str) -> ast.Module | None:
  """Parses a source; None if it is not valid for the running Python."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return ast.parse(text)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None


def find_facts(text: str, module: ast.Module) -> list[Fact]:
  """Lists the facts of a source, by line.

  Args:
    text: the source.
    module: its syntax tree.

  Returns:
    Facts sorted by line; definitions that cannot be asked for are OPAQUE.
  """
  lines = text.split("\n")
  facts: list[Fact] = []
  for node in module.body:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      facts += _function(node, lines, None)
    elif isinstance(node, ast.ClassDef):
      facts.append(_bases(node, lines))
      for member in node.body:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
          facts += _function(member, lines, node)
    elif isinstance(node, ast.Assign):
      facts += _constant(node, lines)
  return sorted(facts, key=lambda fact: fact.line)


def _function(node, lines, owner) -> list[Fact]:
  line = node.lineno - 1
  kind = FactKind.FUNCTION if owner is None else FactKind.METHOD
  answer = _after_name(_DEF, node.name, lines[line])
  if len(answer) < 6 or answer in ("(self)", "(cls)"):  # could be guessed
    kind, answer = FactKind.OPAQUE, ""
  facts = [
    Fact(
      kind=kind,
      line=line,
      scope_line=line if owner is None else owner.lineno - 1,
      qualifier="" if owner is None else owner.name,
      name=node.name,
      answer=answer,
    )
  ]
  if kind != FactKind.FUNCTION:
    return facts
  for match in re.finditer(r"(\w+)=([^,()\[\]{}]+)(?=[,)])", answer):
    if _LITERAL.fullmatch(match[2]) and match[2] not in _COMMON_VALUES:
      facts.append(
        Fact(
          kind=FactKind.DEFAULT,
          line=line,
          scope_line=line,
          qualifier=node.name,
          name=match[1],
          answer=match[2],
        )
      )
  return facts


def _bases(node, lines) -> Fact:
  line = node.lineno - 1
  answer = _after_name(_CLASS, node.name, lines[line])
  asked = len(answer) >= 4 and answer != "(object)"
  return Fact(
    kind=FactKind.BASES if asked else FactKind.OPAQUE,
    line=line,
    scope_line=line,
    qualifier="",
    name=node.name,
    answer=answer if asked else "",
  )


def _constant(node, lines) -> list[Fact]:
  if len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
    return []
  name = node.targets[0].id
  line = node.lineno - 1
  match = _CONSTANT.fullmatch(lines[line])
  answer = match[2] if match and match[1] == name else ""
  asked = 2 <= len(answer) <= 40 and _LITERAL.fullmatch(answer) is not None
  asked = asked and answer not in _COMMON_VALUES
  return [
    Fact(
      kind=FactKind.CONSTANT if asked else FactKind.OPAQUE,
      line=line,
      scope_line=line,
      qualifier="",
      name=name,
      answer=answer if asked else "",
    )
  ]


def _after_name(pattern: re.Pattern, name: str, line: str) -> str:
  """The bracketed part after a name that `pattern` finds at the start."""
  head = pattern.match(line)
  if head is None or head[1] != name:
    return ""
  return _bracketed(line, head.end())


def _bracketed(line: str, start: int) -> str:
  """Text from the bracket at `start` to its partner; "" if not on the line."""
  depth = 0
  for i in range(start, len(line)):
    char = line[i]
    if char in "\"'#":  # a bracket inside a string would be miscounted
      return ""
    depth += char in "([{"
    depth -= char in ")]}"
    if depth == 0:
      answer = line[start : i + 1]
      return answer if len(answer) <= _MAX_ANSWER else ""
  return ""
