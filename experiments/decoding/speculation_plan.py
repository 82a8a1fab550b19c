# SPDX-License-Identifier: Apache-2.0
"""What the speculative-speedup experiment measures, and in which order."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.decoding import speculation_config as config_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One measurement.

  Attributes:
    kind: "speed"; "exact": a comparison in float32; "long": a long prompt and
      a long answer, timed together.
    method: of `speculation_config.METHODS`.
    domain: of `data.domains.DOMAINS`.
    batch: rows.
    temperature: 0 is greedy.
    prompt_len: tokens of a long prompt; 0: as the config says.
    prefill: of `speculation_config.PREFILLS`.
  """

  kind: str
  method: str
  domain: str
  batch: int
  temperature: float
  prompt_len: int = 0
  prefill: str = "dense"

  @property
  def key(self) -> tuple:
    """Identifies the measurement."""
    return dataclasses.astuple(self)

  @property
  def place(self) -> tuple:
    """Where methods are compared with plain decoding."""
    return (
      self.kind,
      self.batch,
      self.temperature,
      self.prompt_len,
      self.prefill,
    )

  def __str__(self) -> str:
    return (
      f"{self.kind} {self.method}, {self.domain}, batch {self.batch}, "
      f"temperature {self.temperature:g}"
      + (f", {self.prefill} {self.prompt_len}" if self.prompt_len else "")
    )


def key(record: Mapping[str, Any]) -> tuple:
  """`Step.key` of a record."""
  return tuple(record[f.name] for f in dataclasses.fields(Step))


def plan(config: config_lib.SpeculationConfig) -> list[list[Step]]:
  """All steps, in groups that differ in method alone."""

  def groups(kind, places, left_out=()):
    for batch, temperature in places:
      # An exact comparison compiles its own programs: greedy ones for all.
      few = few_at if kind == "speed" else {(batch, 0.0)}
      rare = () if (batch, temperature) in few else config.few
      methods = in_order({*config.methods} - {*left_out, *rare})
      for domain in config.domains:
        yield [
          Step(
            kind=kind,
            method=method,
            domain=domain,
            batch=batch,
            temperature=temperature,
          )
          for method in methods
        ]

  few_at = {(batch, float(t)) for batch, t in config.few_at}
  places = [
    (batch, float(t)) for t in config.temperatures for batch in config.batches
  ]
  exact = [
    (batch, float(t))
    for t in config.temperatures
    for batch in config.exact_batches
    if config.exact_prompts
  ]
  # What matters most comes first, should the budget end.
  first = [p for p in places if p[0] in (1, 16) and p[1] == 0.0]
  rest = [p for p in places if p not in first]
  repeated = ("fixed_same", "fixed_best", "eagle2", "joint")
  return [
    *groups("speed", first),
    *groups("exact", exact, repeated),
    *groups("speed", rest),
    *_long_groups(config),
  ]


def _long_groups(
  config: config_lib.SpeculationConfig,
) -> Iterable[list[Step]]:
  for length in config.long_prompts:
    for prefill in config.long_prefills:
      yield [
        Step(
          kind="long",
          method=method,
          domain="long_context",
          batch=1,
          temperature=0.0,
          prompt_len=length,
          prefill=prefill,
        )
        for method in in_order(config.long_methods)
      ]


def in_order(methods: Iterable[str]) -> list[str]:
  """Methods and those that they need, which come before them."""
  methods = {config_lib.PLAIN, *methods}
  if "fixed_same" in methods:
    methods.add("heterospec")
  return [method for method in config_lib.METHODS if method in methods]


def turn_order(methods: Sequence[str], turn: int) -> list[str]:
  """The order of a turn.

  In as many turns as there are methods, each is once in every place, and, if
  their number is even, once behind every other (E. J. Williams, 1949).
  """
  count = len(methods)
  steps = [(i + 1) // 2 * (1 if i % 2 else -1) for i in range(count)]
  return [methods[(turn + step) % count] for step in steps]
