# SPDX-License-Identifier: Apache-2.0
"""What a step of the speculative-speedup experiment is, and how it is taken."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.decoding import speculation_config as config_lib
from experiments.decoding import speculation_setup, speculation_values
from experiments.prefill import long_context_config
from unisparse_jax import attention
from unisparse_jax.speculative import agreement, calibration, oracle, policy
from unisparse_jax.speculative.calibration import predictor

_MAX_GAPS = 8  # rows of a measurement that are looked into
# Methods whose policy is a table: one compiled program.
_TABLES = (
  *("heterospec", "joint", "thrifty", "fixed_same", "fixed_best"),
  "eagle2",
)
_NO_DRAFTER = {"drafter": None, "policy": None, "shape": None}
_DRAFTERS = {"ngram": "ngram", "suffix": "suffix"}


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


def plan(config: config_lib.SpeculationConfig) -> list[Step]:
  """All steps; a later one may need the records of an earlier one."""
  methods = [config_lib.PLAIN]
  methods += [m for m in config.methods if m != config_lib.PLAIN]
  places = [
    (batch, float(t)) for t in config.temperatures for batch in config.batches
  ]
  few_at = {(batch, float(t)) for batch, t in config.few_at}

  def steps(kind, places):
    for batch, temperature in places:
      for method in methods:
        # An exact comparison compiles its own programs: greedy ones for all.
        few = few_at if kind == "speed" else {(batch, 0.0)}
        if method in config.few and (batch, temperature) not in few:
          continue
        for domain in config.domains:
          yield Step(
            kind=kind,
            method=method,
            domain=domain,
            batch=batch,
            temperature=temperature,
          )

  exact = []
  if config.exact_prompts:
    exact = [
      (batch, float(t))
      for t in config.temperatures
      for batch in config.exact_batches
    ]
  # What matters most comes first, should the budget end.
  first = [p for p in places if p[0] in (1, 16) and p[1] == 0.0]
  rest = [p for p in places if p not in first]
  repeated = ("fixed_same", "fixed_best", "eagle2", "joint")
  return [
    *steps("speed", first),
    *(s for s in steps("exact", exact) if s.method not in repeated),
    *steps("speed", rest),
    *_long_steps(config),
  ]


def _long_steps(config: config_lib.SpeculationConfig) -> Iterable[Step]:
  for length in config.long_prompts:
    for prefill in config.long_prefills:
      for method in (config_lib.PLAIN, *config.long_methods):
        yield Step(
          kind="long",
          method=method,
          domain="long_context",
          batch=1,
          temperature=0.0,
          prompt_len=length,
          prefill=prefill,
        )


class Measurer:
  """Takes steps; holds the models, the artefact and plain outputs."""

  def __init__(
    self,
    config: config_lib.SpeculationConfig,
    workdir: pathlib.Path,
    found: Iterable[Mapping[str, Any]],
  ):
    self._config = config
    self._setup = speculation_setup.Setup(config, workdir)
    self._records = list(found)
    self._plain: dict[tuple, np.ndarray] = {}
    self._warm: set[tuple] = set()
    self._artefact = None
    if config.wants_artefact:
      self._artefact = calibration.load(config.artefact)
      self._artefact.check_drafter(self._setup.drafter_hash)
      self._check_policies()

  def _check_policies(self):
    """Raises ValueError where the artefact lacks a policy, or it asks too much.

    Before anything is measured.
    """
    config = self._config
    steps = {
      (step.method, step.batch): step
      for step in plan(config)
      if step.kind == "speed" and step.method in config_lib.CALIBRATED
    }
    for step in steps.values():
      self._policy(step).check(config.shape_for(step.batch))

  def remember(self, record: Mapping[str, Any]):
    """Takes in a record: `fixed_same` needs that of `heterospec`."""
    self._records.append(record)

  def warm(self, steps: Iterable[Step]):
    """Compiles what steps need, several programs at once.

    In `compile_threads` threads; the compiler lets go of the interpreter.
    """
    config = self._config
    if not config.compile_threads:
      return
    programs: dict[tuple, dict[str, Any]] = {}
    for step in steps:
      method = "eagle2" if step.method in _TABLES else step.method
      method = "gated" if method == "predictive" else method
      step = dataclasses.replace(step, method=method, domain=config.domains[0])
      if step.key in programs:
        continue
      dtype, new_tokens, _ = self._sizes(step)
      tokens, lengths = self._setup.padded(
        [np.zeros(2, np.int32)] * step.batch, step.prompt_len
      )
      programs[step.key] = dict(
        tokens=tokens,
        lengths=lengths,
        keys=self._setup.keys(step.domain, 0, step.batch),
        temperature=step.temperature,
        new_tokens=new_tokens,
        dtype=dtype,
        **self._attention_fns(step),
        **self._method(
          step, np.zeros((step.batch, new_tokens), np.int32), lengths
        ),
      )
    self._setup.warm(list(programs.values()), config.compile_threads)

  def _sizes(self, step: Step) -> tuple[str, int, int]:
    """dtype, new tokens and number of prompts."""
    config = self._config
    if step.kind == "exact":
      count = max(config.exact_prompts, step.batch)
      return "float32", config.exact_new_tokens, count
    if step.kind == "long":
      return config.dtype, config.long_new_tokens, config.batch_1_prompts
    count = config.batch_1_prompts if step.batch == 1 else step.batch
    return config.dtype, config.new_tokens, min(count, config.prompts)

  def measure(self, step: Step) -> dict[str, Any]:
    """Values of the record of a step."""
    dtype, new_tokens, count = self._sizes(step)
    prompts = self._setup.prompts(
      step.domain, count=count, use="measure", size=step.prompt_len
    )
    calls, plain_calls, expected, given = [], [], [], []
    for first in range(0, count - step.batch + 1, step.batch):
      tokens, lengths = self._setup.padded(
        prompts[first : first + step.batch], step.prompt_len
      )
      given.append((tokens, lengths))
      common = dict(
        tokens=tokens,
        lengths=lengths,
        keys=self._setup.keys(step.domain, first, step.batch),
        temperature=step.temperature,
        new_tokens=new_tokens,
        dtype=dtype,
        **self._attention_fns(step),
      )
      expected.append(self._expected(step, first, common, dtype))
      arguments = {**common, **self._method(step, expected[-1], lengths)}
      place = (*step.place, step.method)
      if place not in self._warm:
        # Also where another method has compiled the program: a size of the
        # tree that runs for the first time is slow.
        self._setup.call(**arguments)
        self._warm.add(place)
      repeats, plain_repeats = [], []
      for _ in range(self._config.repeats):
        if self._config.interleave and step.method != config_lib.PLAIN:
          plain_repeats.append(self._setup.call(**common, **_NO_DRAFTER))
        repeats.append(self._setup.call(**arguments))
      calls.append(min(repeats, key=lambda call: call.seconds))
      if plain_repeats:
        plain_calls.append(min(plain_repeats, key=lambda call: call.seconds))
    if step.method == config_lib.PLAIN:
      for first, call in enumerate(calls):
        self._plain[self._place(step, first * step.batch, dtype)] = call.tokens
      expected = [call.tokens for call in calls]
    values = {
      **speculation_values.of_calls(calls, step.batch, new_tokens),
      **speculation_values.mismatches(calls, expected),
    }
    if plain_calls:
      values["plain_tokens_per_s"] = values["written"] / sum(
        call.seconds for call in plain_calls
      )
    if values["mismatched_rows"] and not step.temperature:
      values["first_gaps"] = self._gaps(calls, expected, given, dtype)
    return values

  def _gaps(self, calls, expected, given, dtype: str) -> list[float]:
    """Logit gaps at the first difference of some rows: ties, or errors?"""
    target, gaps = self._setup.target(dtype), []
    for call, wanted, (tokens, lengths) in zip(
      calls, expected, given, strict=True
    ):
      for row in np.flatnonzero((call.tokens != wanted).any(axis=1)):
        if len(gaps) == _MAX_GAPS:
          return gaps
        one = slice(row, row + 1)  # alone: one program for every batch size
        found = agreement.first_mismatches(
          target,
          tokens[one],
          wanted[one],
          call.tokens[one],
          lengths=lengths[one],
        )
        gaps += [mismatch.gap for mismatch in found]
    return gaps

  def _place(self, step: Step, first: int, dtype: str) -> tuple:
    return (step.domain, first, dtype, *step.place[1:])

  def _attention_fns(self, step: Step) -> dict[str, Any]:
    """How target and head attend in the prompt."""
    if step.prefill == "dense":
      return {}
    pattern = attention.UniSparse(top_p=self._config.long_top_p)
    sparse = attention.SparseAttention(pattern=pattern)
    if step.prefill == "unisparse":
      return dict(attention_fn=sparse)
    found = long_context_config.calibration_of(self._setup.folder)
    return dict(attention_fn=found.attention(), drafter_attention_fn=sparse)

  def _expected(self, step, first, common, dtype) -> np.ndarray:
    """What plain decoding writes; from the same batch and dtype."""
    place = self._place(step, first, dtype)
    if step.method == config_lib.PLAIN:
      return np.zeros(0)
    if place not in self._plain:
      plain = self._setup.call(**common, **_NO_DRAFTER)
      self._plain[place] = plain.tokens
    return self._plain[place]

  def _method(self, step: Step, expected, lengths) -> dict[str, Any]:
    """drafter, shape and policy of a method; the oracle knows the output."""
    config, method = self._config, step.method
    if method == config_lib.PLAIN:
      return dict(_NO_DRAFTER)
    if method in _DRAFTERS:
      shape = config.chain_shape
      return _in_full(method, shape, shape.max_nodes - 1)
    if method == "static":
      shape = config.static_shape
      count = sum(len(level) for level in shape.static_levels)
      return _in_full(speculation_setup.EAGLE, shape, count)
    if method == "fixed":
      shape = config.fixed_shape_for(step.batch)
      return _in_full(speculation_setup.EAGLE, shape, config.fixed_nodes)
    if method == speculation_setup.COMBINED:
      return dict(
        drafter=method,
        policy=self._setup.table(config.fixed_depth, config.fixed_nodes),
        shape=config.combined_shape_for(step.batch),
      )
    shape = config.shape_for(step.batch)
    if method == "oracle":
      known = oracle.Oracle.create(expected, lengths, shape)
      return dict(drafter=speculation_setup.EAGLE, policy=known, shape=shape)
    return dict(
      drafter=speculation_setup.EAGLE, policy=self._policy(step), shape=shape
    )

  def _policy(self, step: Step) -> Any:
    config, shape = self._config, self._config.shape
    match step.method:
      case "eagle2":
        return self._setup.table(min(6, shape.max_depth), config.fixed_nodes)
      case "fixed_same":
        nodes = round(self._mean_nodes(step)) - 1
        return self._setup.table(config.fixed_depth, nodes)
    artefact = self._artefact
    assert artefact is not None, "config.wants_artefact"
    if step.method in ("predictive", "gated"):
      return predictor.from_artefact(
        artefact, batch=step.batch, gate=step.method == "gated"
      )
    name = {"heterospec": "rule"}.get(step.method, step.method)
    return artefact.policy(
      name, batch=step.batch, drafter_hash=self._setup.drafter_hash
    )

  def _mean_nodes(self, step: Step) -> float:
    """Nodes, root included, of `heterospec` in the same place."""
    wanted = dataclasses.replace(step, method="heterospec").key
    for record in self._records:
      if key(record) == wanted:
        return record["nodes_per_call"]
    raise ValueError(
      "methods must name heterospec before fixed_same; got "
      f"{self._config.methods}."
    )


def _in_full(drafter: str, shape, nodes: int) -> dict[str, Any]:
  """drafter, shape and policy of a tree of all levels in every step."""
  everything = policy.Fixed(
    depth=jnp.int32(shape.max_depth), nodes=jnp.int32(nodes)
  )
  return dict(drafter=drafter, policy=everything, shape=shape)
