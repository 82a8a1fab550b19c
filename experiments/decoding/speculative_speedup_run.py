# SPDX-License-Identifier: Apache-2.0
"""How the steps of the speculative-speedup experiment are taken.

The methods of one place and domain are timed in turns: a card drifts by a tenth
within minutes, more than methods differ. They are timed on one text, that of
plain decoding: on the text of each, luck alone would make them differ as much.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.decoding import speculation_config as config_lib
from experiments.decoding import speculation_plan as plan_lib
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
_DRAFTERS = {"ngram": "ngram", "suffix": "suffix"}


class Measurer:
  """Takes groups of steps; holds the models and the artefact."""

  def __init__(
    self, config: config_lib.SpeculationConfig, workdir: pathlib.Path
  ):
    self._config = config
    self._setup = speculation_setup.Setup(config, workdir)
    self._compiled: set[tuple] = set()
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
      for group in plan_lib.plan(config)
      for step in group
      if step.kind == "speed" and step.method in config_lib.CALIBRATED
    }
    for step in steps.values():
      self._policy(step).check(config.shape_for(step.batch))

  def warm(self, group: Sequence[plan_lib.Step]):
    """Compiles what a group lacks, several programs at once.

    In `compile_threads` threads; the compiler lets go of the interpreter. The
    other domains of a place find its programs compiled.
    """
    config, first = self._config, group[0]
    if not config.compile_threads:
      return
    common = self._inputs(first)[0]
    plain = np.zeros((first.batch, common["new_tokens"]), np.int32)
    programs = []
    for method in plan_lib.in_order(step.method for step in group):
      method = "eagle2" if method in _TABLES else method
      if (*first.place, method) not in self._compiled:
        self._compiled.add((*first.place, method))
        step = dataclasses.replace(first, method=method)
        programs.append(
          {**common, **self._method(step, plain, common["lengths"])}
        )
    self._setup.warm(programs, config.compile_threads)

  def _sizes(self, step: plan_lib.Step) -> tuple[str, int, int]:
    """dtype, new tokens and number of prompts."""
    config = self._config
    if step.kind == "exact":
      count = max(config.exact_prompts, step.batch)
      return "float32", config.exact_new_tokens, count
    if step.kind == "long":
      return config.dtype, config.long_new_tokens, config.batch_1_prompts
    count = config.batch_1_prompts if step.batch == 1 else step.batch
    return config.dtype, config.new_tokens, min(count, config.prompts)

  def _inputs(self, step: plan_lib.Step) -> list[dict[str, Any]]:
    """Arguments of a call that a group's methods share, by batch of prompts."""
    dtype, new_tokens, count = self._sizes(step)
    prompts = self._setup.prompts(
      step.domain, count=count, use="measure", size=step.prompt_len
    )
    attention_fns, inputs = self._attention_fns(step), []
    for first in range(0, count - step.batch + 1, step.batch):
      tokens, lengths = self._setup.padded(
        prompts[first : first + step.batch], step.prompt_len
      )
      inputs.append(
        dict(
          tokens=tokens,
          lengths=lengths,
          keys=self._setup.keys(step.domain, first, step.batch),
          temperature=step.temperature,
          new_tokens=new_tokens,
          dtype=dtype,
          **attention_fns,
        )
      )
    return inputs

  def measure(self, group: Sequence[plan_lib.Step]) -> list[dict[str, Any]]:
    """Values of the records of a group's steps, in their order.

    Every program runs once untimed, which says what it writes: a size of the
    tree that runs for the first time is slow, compiled or not. The turns that
    follow say how long it takes and, on plain decoding's text, how many calls;
    an exact comparison has none.
    """
    first, methods = group[0], [step.method for step in group]
    inputs, is_timed = self._inputs(first), first.kind != "exact"

    def counts(calls):
      return speculation_values.of_calls(
        calls, first.batch, inputs[0]["new_tokens"]
      )

    arguments: dict[str, list[dict[str, Any]]] = {}
    values: dict[str, dict[str, Any]] = {}
    expected = [np.zeros(0)] * len(inputs)  # what plain decoding writes
    for method in plan_lib.in_order(methods):
      step, nodes = dataclasses.replace(first, method=method), None
      if method == "fixed_same":
        like = [self._setup.call(**a) for a in arguments["heterospec"]]
        nodes = round(counts(like)["nodes_per_call"]) - 1
      arguments[method] = [
        common | self._method(step, tokens, common["lengths"], nodes)
        for common, tokens in zip(inputs, expected, strict=True)
      ]
      calls = [self._setup.call(**a) for a in arguments[method]]
      if method == config_lib.PLAIN:
        expected = [call.tokens for call in calls]
      found = counts(calls) | speculation_values.mismatches(calls, expected)
      if found["mismatched_rows"] and not first.temperature:
        found["first_gaps"] = self._gaps(calls, expected, inputs)
      if is_timed and self._config.same_text and method != config_lib.PLAIN:
        found["own_tokens_per_call"] = found["tokens_per_call"]
        for given, tokens in zip(arguments[method], expected, strict=True):
          given["reference"] = tokens
      values[method] = found
    if is_timed:
      timed = dict.fromkeys((config_lib.PLAIN, *methods))
      times, calls = self._times({name: arguments[name] for name in timed})
      for method in methods:
        values[method] |= counts(calls[method])
        values[method] |= speculation_values.of_times(
          times, method, values[method]["written"], len(inputs)
        )
    return [values[method] for method in methods]

  def _times(
    self, arguments: Mapping[str, Sequence[dict[str, Any]]]
  ) -> tuple[dict[str, np.ndarray], dict[str, list[speculation_setup.Call]]]:
    """Seconds of decoding and of prefill [repeats, 2]; calls of the first turn.

    By method; methods take turns at every batch of prompts.
    """
    calls: dict[str, list[speculation_setup.Call]] = {n: [] for n in arguments}
    times = {name: np.zeros((self._config.repeats, 2)) for name in arguments}
    num_batches = len(arguments[config_lib.PLAIN])
    for turn in range(self._config.repeats):
      for number in range(num_batches):
        for name in plan_lib.turn_order(
          [*arguments], turn * num_batches + number
        ):
          call = self._setup.call(**arguments[name][number])
          times[name][turn] += call.seconds, call.prefill_seconds
          if not turn:
            calls[name].append(call)
    return times, calls

  def _gaps(self, calls, expected, inputs) -> list[float]:
    """Logit gaps at the first difference of some rows: ties, or errors?"""
    target, gaps = self._setup.target(inputs[0]["dtype"]), []
    for call, wanted, common in zip(calls, expected, inputs, strict=True):
      for row in np.flatnonzero((call.tokens != wanted).any(axis=1)):
        if len(gaps) == _MAX_GAPS:
          return gaps
        one = slice(row, row + 1)  # alone: one program for every batch size
        found = agreement.first_mismatches(
          target,
          common["tokens"][one],
          wanted[one],
          call.tokens[one],
          lengths=common["lengths"][one],
        )
        gaps += [mismatch.gap for mismatch in found]
    return gaps

  def _attention_fns(self, step: plan_lib.Step) -> dict[str, Any]:
    """How target and head attend in the prompt."""
    if step.prefill == "dense":
      return {}
    pattern = attention.UniSparse(top_p=self._config.long_top_p)
    sparse = attention.SparseAttention(pattern=pattern)
    if step.prefill == "unisparse":
      return dict(attention_fn=sparse)
    found = long_context_config.calibration_of(self._setup.folder)
    return dict(attention_fn=found.attention(), drafter_attention_fn=sparse)

  def _method(
    self, step: plan_lib.Step, expected, lengths, nodes: int | None = None
  ) -> dict[str, Any]:
    """drafter, shape and policy of a method.

    Args:
      step: names it.
      expected: int32 [batch, new_tokens], which the oracle knows.
      lengths: int32 [batch], of the prompts.
      nodes: draft nodes of `fixed_same`.
    """
    config, method = self._config, step.method
    if method == config_lib.PLAIN:
      return {"drafter": None, "policy": None, "shape": None}
    if method in _DRAFTERS:
      shape = config.chain_shape
      return _in_full(method, shape, shape.max_nodes - 1)
    if method == "static":
      shape = config.static_shape
      count = sum(len(level) for level in shape.static_levels)
      return _in_full(speculation_setup.EAGLE, shape, count)
    if method == "fixed":
      shape = config.fixed_shape
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
    if method == "eagle2":
      chosen = self._setup.table(min(6, shape.max_depth), config.fixed_nodes)
    elif method == "fixed_same":
      assert nodes is not None
      chosen = self._setup.table(config.fixed_depth, nodes)
    else:
      chosen = self._policy(step)
    return dict(drafter=speculation_setup.EAGLE, policy=chosen, shape=shape)

  def _policy(self, step: plan_lib.Step) -> Any:
    """Of the artefact."""
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


def _in_full(drafter: str, shape, nodes: int) -> dict[str, Any]:
  """drafter, shape and policy of a tree of all levels in every step."""
  everything = policy.Fixed(
    depth=jnp.int32(shape.max_depth), nodes=jnp.int32(nodes)
  )
  return dict(drafter=drafter, policy=everything, shape=shape)
