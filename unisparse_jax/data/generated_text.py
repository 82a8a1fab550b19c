# SPDX-License-Identifier: Apache-2.0
"""Generated text: arithmetic word problems, and tables in several notations.

Both are written by rule from random numbers, so that the steps of a problem and
the second notation of a table follow from what stands before them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

_NAMES = (
  "Ada Alan Alice Amir Anna Ben Bella Carl Chloe Clara Dan Diana Emil Emma Eva "
  "Finn Grace Hana Hugo Ida Ivan Jack Jane Julia Karl Kim Lena Leo Lily Lucas "
  "Maria Mark Mary Maya Max Mia Nina Noah Nora Olga Oscar Paul Peter Rosa Sam "
  "Sara Sofia Tim Tom Vera Victor Will Zoe"
).split()
_ITEMS = (
  "apples balls books boxes bricks buttons cakes candles cards chairs coins "
  "cookies cups eggs flowers lemons letters marbles melons notebooks oranges "
  "pages pears pencils photos plants plates shells shirts stamps stickers "
  "stones tickets toys"
).split()
_CITIES = (
  "Athens Basel Berlin Bonn Boston Cairo Chicago Delhi Dublin Geneva Lagos "
  "Lima Lisbon London Lyon Madrid Milan Munich Oslo Paris Prague Quito Rome "
  "Seoul Sydney Tokyo Turin Vienna Warsaw Zurich"
).split()
_COLOURS = "black blue brown green grey orange pink purple red white".split()
_STATES = "active closed delayed failed new open paid pending sent".split()
# Columns of a table: name and what it holds.
_COLUMNS: dict[str, str] = {
  "name": "name",
  "owner": "name",
  "city": "city",
  "origin": "city",
  "colour": "colour",
  "status": "state",
  "item": "item",
  "count": "count",
  "stock": "count",
  "age": "age",
  "year": "year",
  "price": "price",
  "weight": "price",
  "valid": "bool",
  "code": "code",
}
_TABLES = (
  "orders clients books parts users tasks shipments accounts events sensors"
).split()

Row = dict[str, object]


def word_problem(rng: np.random.Generator) -> str:
  """A question, its steps and its answer, in three paragraphs' lines."""
  make = _PROBLEMS[int(rng.integers(len(_PROBLEMS)))]
  question, steps, answer = make(rng)
  lines = [f"Question: {question}", "Steps:"]
  lines += [f"  {number}. {step}" for number, step in enumerate(steps, 1)]
  return "\n".join([*lines, f"Answer: {answer}"]) + "\n\n"


def table(rng: np.random.Generator) -> str:
  """One table twice: in one notation, then in another."""
  name = _pick(rng, _TABLES)
  num_columns = int(rng.integers(3, 6))
  columns = list(rng.choice(sorted(_COLUMNS), size=num_columns, replace=False))
  first_id = int(rng.integers(1, 900))
  rows: list[Row] = [
    {"id": first_id + i}
    | {str(column): _value(rng, _COLUMNS[str(column)]) for column in columns}
    for i in range(int(rng.integers(4, 13)))
  ]
  order = rng.permutation(len(_NOTATIONS))[:2]
  parts = []
  for index in order:
    title, write = _NOTATIONS[int(index)]
    parts.append(f"# {name} as {title}\n{write(rows)}\n")
  return "".join(parts) + "\n"


def _pick(rng: np.random.Generator, values: Sequence[str]) -> str:
  return values[int(rng.integers(len(values)))]


def _two(rng: np.random.Generator, values: Sequence[str]) -> list[str]:
  return [str(value) for value in rng.choice(values, size=2, replace=False)]


def _shared(rng):
  (a, b), item = _two(rng, _NAMES), _pick(rng, _ITEMS)
  n, m, k = (int(x) for x in rng.integers(3, 60, 3))
  question = (
    f"{a} has {n} {item} and {b} has {m} {item}. They find {k} more {item} "
    f"together. How many {item} do they have in all?"
  )
  steps = (
    f"{a} and {b} have {n} + {m} = {n + m} {item}.",
    f"With the {k} {item} that they find they have {n + m} + {k} = "
    f"{n + m + k} {item}.",
  )
  return question, steps, n + m + k


def _bags(rng):
  (a, b), item = _two(rng, _NAMES), _pick(rng, _ITEMS)
  n, bags, each = (int(x) for x in rng.integers(2, 13, 3))
  n *= 5
  given = int(rng.integers(1, n))
  total = n + bags * each
  question = (
    f"{a} has {n} {item}. {a} buys {bags} bags with {each} {item} each and "
    f"gives {given} {item} to {b}. How many {item} does {a} have now?"
  )
  steps = (
    f"The bags hold {bags} * {each} = {bags * each} {item}.",
    f"{a} then has {n} + {bags * each} = {total} {item}.",
    f"After giving {given} {item} to {b}, {a} has {total} - {given} = "
    f"{total - given} {item}.",
  )
  return question, steps, total - given


def _cost(rng):
  a = _pick(rng, _NAMES)
  first, second = _two(rng, _ITEMS)
  n, m = (int(x) for x in rng.integers(2, 10, 2))
  p, r = (int(x) for x in rng.integers(2, 16, 2))
  paid = (n * p + m * r) // 10 * 10 + 10 * int(rng.integers(1, 4))
  total = n * p + m * r
  question = (
    f"{a} buys {n} {first} at {p} dollars each and {m} {second} at {r} "
    f"dollars each, and pays with {paid} dollars. How much change does {a} "
    "get?"
  )
  steps = (
    f"The {first} cost {n} * {p} = {n * p} dollars.",
    f"The {second} cost {m} * {r} = {m * r} dollars.",
    f"Together they cost {n * p} + {m * r} = {total} dollars.",
    f"The change is {paid} - {total} = {paid - total} dollars.",
  )
  return question, steps, paid - total


def _trip(rng):
  a, (start, end) = _pick(rng, _NAMES), _two(rng, _CITIES)
  speed = 10 * int(rng.integers(3, 13))
  hours, more = (int(x) for x in rng.integers(2, 8, 2))
  question = (
    f"{a} drives from {start} to {end} at {speed} miles per hour for {hours} "
    f"hours and then for {more} more hours at the same speed. How many miles "
    f"does {a} drive?"
  )
  steps = (
    f"{a} drives for {hours} + {more} = {hours + more} hours.",
    f"At {speed} miles per hour that is {speed} * {hours + more} = "
    f"{speed * (hours + more)} miles.",
  )
  return question, steps, speed * (hours + more)


def _split(rng):
  a, item = _pick(rng, _NAMES), _pick(rng, _ITEMS)
  friends, each, kept = (int(x) for x in rng.integers(2, 12, 3))
  total = friends * each + kept
  question = (
    f"{a} has {total} {item}, keeps {kept} of them and shares the rest "
    f"equally among {friends} friends. How many {item} does each friend get?"
  )
  steps = (
    f"{a} shares {total} - {kept} = {total - kept} {item}.",
    f"Each friend gets {total - kept} / {friends} = {each} {item}.",
  )
  return question, steps, each


def _weeks(rng):
  a, item = _pick(rng, _NAMES), _pick(rng, _ITEMS)
  per_day, weeks, sold = (int(x) for x in rng.integers(2, 9, 3))
  total = per_day * 7 * weeks
  sold = min(sold * 5, total - 1)
  question = (
    f"{a} makes {per_day} {item} every day. After {weeks} weeks {a} sells "
    f"{sold} of the {item}. How many {item} are left?"
  )
  steps = (
    f"There are {weeks} * 7 = {weeks * 7} days.",
    f"{a} makes {per_day} * {weeks * 7} = {total} {item}.",
    f"There are {total} - {sold} = {total - sold} {item} left.",
  )
  return question, steps, total - sold


_PROBLEMS = (_shared, _bags, _cost, _trip, _split, _weeks)


def _value(rng: np.random.Generator, kind: str) -> object:
  match kind:
    case "name":
      return _pick(rng, _NAMES)
    case "city":
      return _pick(rng, _CITIES)
    case "colour":
      return _pick(rng, _COLOURS)
    case "state":
      return _pick(rng, _STATES)
    case "item":
      return _pick(rng, _ITEMS)
    case "count":
      return int(rng.integers(0, 500))
    case "age":
      return int(rng.integers(18, 90))
    case "year":
      return int(rng.integers(1980, 2027))
    case "price":
      return round(float(rng.uniform(1, 200)), 2)
    case "bool":
      return bool(rng.random() < 0.5)
    case "code":
      letters = "".join(
        "ABCDEFGHKLMNPRSTUX"[i] for i in rng.integers(18, size=2)
      )
      return f"{letters}-{int(rng.integers(100, 1000))}"
  raise AssertionError(f"{kind} is a kind of _COLUMNS")


def _plain(value: object) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def _as_csv(rows: Sequence[Row]) -> str:
  lines = [",".join(rows[0])]
  lines += [",".join(map(_plain, row.values())) for row in rows]
  return "\n".join(lines)


def _as_json(rows: Sequence[Row]) -> str:
  lines = ",\n".join("  " + json.dumps(row) for row in rows)
  return f"[\n{lines}\n]"


def _as_long_json(rows: Sequence[Row]) -> str:
  return json.dumps(rows, indent=2)


def _as_markdown(rows: Sequence[Row]) -> str:
  lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
  lines += [" | ".join(map(_plain, row.values())) for row in rows]
  return "\n".join(f"| {line} |" for line in lines)


def _as_yaml(rows: Sequence[Row]) -> str:
  lines = []
  for row in rows:
    fields = [f"{name}: {_plain(value)}" for name, value in row.items()]
    lines += [f"- {fields[0]}", *(f"  {field}" for field in fields[1:])]
  return "\n".join(lines)


_NOTATIONS: tuple[tuple[str, Callable[[Sequence[Row]], str]], ...] = (
  ("CSV", _as_csv),
  ("JSON lines", _as_json),
  ("JSON", _as_long_json),
  ("Markdown", _as_markdown),
  ("YAML", _as_yaml),
)
