# SPDX-License-Identifier: Apache-2.0
"""Questions about code: RULER's `qa_1` and `qa_2`, re-founded on facts.

The context is a shuffled set of documents, each a piece of a real module under
a header with its file name. `qa_1` asks for one fact: the arguments of a
function, a default, the value of a constant, the bases of a class. `qa_2` needs
two: the arguments of a method of a named class, where other classes in the
context have a method of that name, or the line after a given line. The answer
is always the literal text of the context.

Source: Hsieh et al., 2024, RULER, section 3, for the form (documents, shuffled
and numbered, "part" match); questions and documents are this project's.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses

import numpy as np

from unisparse_jax.tasks import base, line_tokens

_INTRO = "# Answer the questions based on the given documents.\n"
_RESERVE = 64  # tokens of a question, about; what is left over goes to code
_MIN_DOCUMENT = 160
_QUESTION_LEN = 100
_TRIES = 20  # contexts without a question in them


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeQuestions(base.Task):
  """`qa_1` (num_hops = 1) or `qa_2` (num_hops = 2)."""

  match: str = "part"
  max_new_tokens: int = 64
  num_hops: int

  def build(self, rng, haystack, tokenizer, budget, *, training):
    count = 1
    if training:
      most = min(base.MAX_QUESTIONS, budget // 200)
      count = max(2, base.many(rng, max(2, most)))
    for _ in range(_TRIES):
      episode = self._try(rng, haystack, tokenizer, budget, count, training)
      if episode is not None:
        return episode
    # Pieces of different files cannot be longer than all of them together.
    num_tokens = len(haystack.tokens)
    if budget > 0.5 * num_tokens:
      raise ValueError(
        f"max_len must be well below the haystack for {self.name}; got "
        f"max_len={budget + 1}; expected max_len <= {num_tokens // 2}."
      )
    raise base.TooSmallError

  def _try(self, rng, haystack, tokenizer, budget, count, training):
    reserve = count * (_QUESTION_LEN if training else _RESERVE)
    reserve += 0 if training else self.max_new_tokens
    intro = tokenizer.encode(_INTRO)
    documents = _pick_documents(
      rng, haystack, tokenizer, budget - len(intro) - reserve
    )
    if not documents:
      return None
    used = sum(document.num_tokens for document in documents)
    room = budget - len(intro) - used
    if not training and room - reserve > 0.05 * budget:
      return None
    questions = []
    for question in self._candidates(rng, haystack, documents, 2 * count):
      cost = base.questions_len(self, tokenizer, [question], training)
      if cost <= room and len(questions) < count:
        room -= cost
        questions.append(question)
    if not questions:
      return None
    tokens = [intro]
    weights = [np.full(len(intro), line_tokens.RANDOM_WEIGHT, np.float32)]
    for document in documents:
      tokens += [document.header, document.code]
      weights += [
        np.full(len(document.header), line_tokens.RANDOM_WEIGHT, np.float32),
        np.full(len(document.code), line_tokens.CODE_WEIGHT, np.float32),
      ]
    return base.Episode(
      context=np.concatenate(tokens),
      context_weights=np.concatenate(weights),
      questions=questions,
      metadata={"num_documents": len(documents)},
    )

  def _candidates(self, rng, haystack, documents, count):
    """Questions with one right answer in the context, in random order."""
    if self.num_hops == 1:
      return _one_hop(rng, haystack, documents, count)
    methods = _methods(rng, haystack, documents, count)
    lines = _next_lines(rng, haystack, documents, count)
    mixed = methods[: count // 2 + 1] + lines[: count // 2 + 1]
    return [mixed[i] for i in rng.permutation(len(mixed))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Document:
  """A piece of a file in the context."""

  name: str
  first_line: int
  last_line: int  # one past
  header: np.ndarray
  code: np.ndarray

  @property
  def num_tokens(self) -> int:
    return len(self.header) + len(self.code)


def _pick_documents(rng, haystack, tokenizer, room) -> list[_Document]:
  """Pieces of different files, in random order, that fill the room."""
  num_files = len(haystack.file_names)
  # Some twenty pieces of a long context, but all files must be able to fill it.
  longest = max(_MIN_DOCUMENT + 200, room // 12, 4 * room // num_files)
  seen_files: set[int] = set()
  seen_names: set[str] = set()
  documents: list[_Document] = []
  tries = 0
  while room >= 24 and tries < 4 * num_files + 16:
    tries += 1
    # By line, so that a long file comes up more often than a short one.
    line = int(rng.integers(len(haystack.line_hashes)))
    file = int(np.searchsorted(haystack.file_lines, line, "right")) - 1
    name = _short_name(haystack.file_names[file])
    if file in seen_files or name in seen_names:
      continue
    header = tokenizer.encode(f"# Document {len(documents) + 1}: {name}\n")
    size = int(rng.integers(_MIN_DOCUMENT, longest + 1))
    size = min(size, room - len(header))
    if room - len(header) - size < _MIN_DOCUMENT:
      size = room - len(header)  # the last one takes what is left
    first, last = _piece(haystack, file, line, size)
    if last <= first:
      continue
    start, stop = haystack.line_offsets[first], haystack.line_offsets[last]
    documents.append(
      _Document(
        name=name,
        first_line=first,
        last_line=last,
        header=header,
        code=haystack.tokens[start:stop].astype(np.int32),
      )
    )
    seen_files.add(file)
    seen_names.add(name)
    room -= documents[-1].num_tokens
  return documents


def _piece(haystack, file, line, size) -> tuple[int, int]:
  """Lines of a file, at most `size` tokens, that hold `line` if they can."""
  offsets = haystack.line_offsets
  low, high = haystack.file_lines[file : file + 2]
  if offsets[high] - offsets[low] <= size:
    return int(low), int(high)
  # As far back from the end of the file as the piece needs to be full.
  latest = int(np.searchsorted(offsets, offsets[high] - size, "left"))
  first = min(line, latest)
  last = int(np.searchsorted(offsets, offsets[first] + size, "right")) - 1
  return first, min(last, int(high))


def _short_name(name: str) -> str:
  return "/".join(name.split("/")[-2:])


def _facts_in(haystack, documents):
  """(fact, document) for every fact in the context."""
  facts = haystack.facts

  def first_at(line):
    # numpy would copy the column of a large corpus at every call.
    return bisect.bisect_left(facts, line, key=lambda fact: int(fact["line"]))

  found = []
  for document in documents:
    low, high = first_at(document.first_line), first_at(document.last_line)
    found += [(haystack.fact(i), document) for i in range(low, high)]
  return found


def _one_hop(rng, haystack, documents, count) -> list[base.Question]:
  found = _facts_in(haystack, documents)
  uses = collections.Counter(
    (fact.qualifier if fact.kind.name == "DEFAULT" else "", fact.name)
    for fact, _ in found
  )
  asked = []
  for fact, document in found:
    if fact.kind.name in ("FUNCTION", "CONSTANT", "BASES"):
      if uses["", fact.name] == 1:
        asked.append((fact, document))
    elif (
      fact.kind.name == "DEFAULT"
      and uses[fact.qualifier, fact.name] == 1
      and uses["", fact.qualifier] == 1
    ):
      asked.append((fact, document))
    elif (
      fact.kind.name == "METHOD"
      and uses["", fact.name] == 1
      and not fact.name.startswith("__")
    ):
      asked.append((fact, document))
  # Methods outnumber all else: each kind gets the same chance to come next.
  by_kind: dict[int, list] = {}
  for i in rng.permutation(len(asked)):
    by_kind.setdefault(int(asked[i][0].kind), []).append(asked[i])
  chosen = []
  while by_kind and len(chosen) < count:
    kind = sorted(by_kind)[int(rng.integers(len(by_kind)))]
    chosen.append(by_kind[kind].pop())
    if not by_kind[kind]:
      del by_kind[kind]
  return [_fact_question(fact, document.name) for fact, document in chosen]


def _fact_question(fact, file) -> base.Question:
  name = fact.name
  if fact.kind.name in ("FUNCTION", "METHOD"):
    question = f"What are the arguments of the function {name} in {file}?"
    prefix, answer = f"def {name}", fact.answer
  elif fact.kind.name == "CONSTANT":
    question = f"What is the value of the constant {name} in {file}?"
    prefix, answer = f"{name} =", f" {fact.answer}"
  elif fact.kind.name == "BASES":
    question = f"What are the bases of the class {name} in {file}?"
    prefix, answer = f"class {name}", fact.answer
  else:
    question = (
      f"What is the default of the argument {name} of the function "
      f"{fact.qualifier} in {file}?"
    )
    prefix, answer = f"def {fact.qualifier}: {name}", f"={fact.answer}"
  return base.Question(
    prompt=f"# {question}\n# Answer: {prefix}",
    answer=f"{answer}\n",
    targets=(fact.answer,),
    metadata={"kind": fact.kind.name.lower(), "file": file},
  )


def _methods(rng, haystack, documents, count) -> list[base.Question]:
  """Methods whose name is in the context more than once."""
  found = _facts_in(haystack, documents)
  names = collections.Counter(fact.name for fact, _ in found)
  full_names = collections.Counter(
    (fact.qualifier, fact.name) for fact, _ in found
  )
  questions = []
  for i in rng.permutation(len(found)):
    fact, document = found[i]
    if (
      fact.kind.name == "METHOD"
      and names[fact.name] > 1
      and full_names[fact.qualifier, fact.name] == 1
      and fact.scope_line >= document.first_line
    ):
      questions.append(
        base.Question(
          prompt=(
            f"# What are the arguments of the method {fact.name} of the class "
            f"{fact.qualifier} in {document.name}?\n"
            f"# Answer: class {fact.qualifier}: def {fact.name}"
          ),
          answer=f"{fact.answer}\n",
          targets=(fact.answer,),
          metadata={"kind": "method", "file": document.name},
        )
      )
      if len(questions) == count:
        break
  return questions


def _next_lines(rng, haystack, documents, count) -> list[base.Question]:
  """Lines that are in the context once, and what comes after them."""
  hashes = np.concatenate(
    [haystack.line_hashes[d.first_line : d.last_line] for d in documents]
  )
  values, counts = np.unique(hashes, return_counts=True)
  once = values[counts == 1]
  sizes = np.array([d.last_line - d.first_line for d in documents])
  questions = []
  for _ in range(4 * count):
    document = documents[int(rng.choice(len(documents), p=sizes / sizes.sum()))]
    if document.last_line - document.first_line < 2:
      continue
    line = int(rng.integers(document.first_line, document.last_line - 1))
    place = int(np.searchsorted(once, haystack.line_hashes[line]))
    if place == len(once) or once[place] != haystack.line_hashes[line]:
      continue
    given = haystack.line_text(line).strip()
    following = haystack.line_text(line + 1).strip()
    if not (10 <= len(given) <= 72 and 6 <= len(following) <= 72):
      continue
    # Two blanks, so that the code is cut into tokens as it is in a block.
    questions.append(
      base.Question(
        prompt=(
          f"# Which line comes after this line of {document.name}?\n"
          f"#  {given}\n# Answer:"
        ),
        answer=f"  {following}\n",
        targets=(following,),
        metadata={"kind": "next_line", "file": document.name},
      )
    )
    once = np.delete(once, place)
  return questions[:count]
