# SPDX-License-Identifier: Apache-2.0
"""Facts of a literal source."""

import textwrap

from unisparse_jax.data import code_facts

_SOURCE = textwrap.dedent(
  '''
  """Doc."""
  LIMIT = 4096
  NAME = 'abc'  # a comment hides the literal
  MODE = "fast"
  FLAG = True

  def plain(first, second, depth=4, mode='x', flag=True):
    return first

  def empty():
    pass

  def spread(first,
             second):
    pass

  class Base(object):
    def __init__(self, path, *, size=8) -> None:
      pass

    def close(self):
      pass

  class Child(Base, dict):
    async def __init__(self, value: list[int]):
      pass
  '''
).strip("\n")


def _facts():
  facts = code_facts.find_facts(_SOURCE, code_facts.parse(_SOURCE))
  return {(f.kind.name, f.qualifier, f.name): f for f in facts}


def test_answers():
  answers = {key: fact.answer for key, fact in _facts().items()}
  assert answers == {
    ("CONSTANT", "", "LIMIT"): "4096",
    ("OPAQUE", "", "NAME"): "",
    ("CONSTANT", "", "MODE"): '"fast"',
    ("OPAQUE", "", "FLAG"): "",
    # A quoted default hides where the brackets end.
    ("OPAQUE", "", "plain"): "",
    ("OPAQUE", "", "empty"): "",
    ("OPAQUE", "", "spread"): "",
    ("OPAQUE", "", "Base"): "",
    ("METHOD", "Base", "__init__"): "(self, path, *, size=8)",
    ("OPAQUE", "Base", "close"): "",
    ("BASES", "", "Child"): "(Base, dict)",
    ("METHOD", "Child", "__init__"): "(self, value: list[int])",
  }


def test_answers_stand_on_their_line():
  lines = _SOURCE.split("\n")
  for fact in _facts().values():
    assert fact.name in lines[fact.line]
    assert fact.answer in lines[fact.line]
    if fact.qualifier:
      assert f"class {fact.qualifier}" in lines[fact.scope_line]


def test_defaults():
  text = "def walk(top, depth=4, *, size=-1, on=None, flag=False):\n  pass\n"
  facts = code_facts.find_facts(text, code_facts.parse(text))
  defaults = {
    f.name: (f.qualifier, f.answer)
    for f in facts
    if f.kind == code_facts.FactKind.DEFAULT
  }
  assert defaults == {"depth": ("walk", "4"), "size": ("walk", "-1")}


def test_invalid_source_has_no_tree():
  assert code_facts.parse("print 'python 2'") is None
  assert code_facts.parse("x = '\\d'\n") is not None  # a warning, not an error
