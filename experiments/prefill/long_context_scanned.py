# SPDX-License-Identifier: Apache-2.0
"""The long-context measurements with one program for all layers and budgets."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.prefill import long_context_config as config_lib
from experiments.prefill import long_context_programs, long_context_run
from unisparse_jax import data, evaluation, models, timing

_GROUP_MS = 20.0  # of queued calls, where one layer's attention is short


class ScannedMeasurer(long_context_run.Measurer):
  """Takes the same steps as `Measurer`, in the same records.

  Args:
    config: the settings, with scan_layers.
    model: a decoder.
    corpus: held-out code.
    workdir: folder of the run.
  """

  def __init__(
    self,
    config: config_lib.LongContextConfig,
    model: models.Decoder,
    corpus: data.CodeCorpus,
    workdir: pathlib.Path,
  ):
    super().__init__(config, model, corpus, workdir)
    self.programs = long_context_programs.Programs(
      config, model.config, (corpus.tokenizer.newline_id,)
    )
    self._params, self._layer_params = self.programs.params(model)

  def measure(self, step: long_context_run.Step) -> dict[str, Any]:
    if step.kind in long_context_run.TIMED:
      self.programs.wait()  # a compiler beside it would spoil the time
    return super().measure(step)

  def _run_prefill(self, label, length, tokens, num_tokens):
    _, budgets = self.programs.budgeted(label)
    return self.programs.prefill(label, length)(
      self._params,
      self._layer_params,
      jnp.asarray(tokens, jnp.int32)[None],
      jnp.asarray([num_tokens], jnp.int32),
      budgets,
    )

  def _answers(self, step: long_context_run.Step) -> dict[str, Any]:
    prompt_len = self._config.prompt_len(step.length)
    samples = self._share(
      "samples",
      lambda: long_context_run.draw_samples(
        step.item,
        self._corpus,
        seed=self._config.seed,
        count=self._config.samples,
        prompt_len=prompt_len,
        length=step.length,
      ),
      step.item,
    )
    tokens, lengths = evaluation.pad_prompts(samples, prompt_len)
    rows = tuple(
      dataclasses.replace(
        self._run_prefill(step.pattern, step.length, row, num_tokens),
        residual=None,
      )
      for row, num_tokens in zip(tokens, lengths, strict=True)
    )
    new_tokens = self.programs.decode(step.length)(self._params, rows)
    return long_context_run.answer_record(
      evaluation.score_tokens(
        samples, np.asarray(new_tokens), self._corpus.tokenizer.decode
      )
    )

  def _next_token(self, step: long_context_run.Step) -> dict[str, Any]:
    code = self._share("code", self._code)
    code = code[:, : self._config.prompt_len(step.length)]
    values = []
    for row, tokens in enumerate(code):
      # Of a pass only [1, length, embed_dim] is kept, of dense ones for the
      # patterns to come.
      dense_residual = self._share(
        "dense_residual",
        lambda tokens=tokens: self._residual(config_lib.DENSE, tokens),
        row,
      )
      residual = dense_residual
      if step.pattern != config_lib.DENSE:
        residual = self._residual(step.pattern, tokens)
      compared = self.programs.compare(step.length)(
        self._params, tokens[None], residual, dense_residual
      )
      values.append({name: float(x) for name, x in compared.items()})
    return {
      name: float(np.mean([value[name] for value in values]))
      for name in values[0]
    }

  def _residual(self, label: str, tokens: jax.Array) -> jax.Array:
    found = self._run_prefill(label, self._length, tokens, len(tokens))
    assert found.residual is not None
    return found.residual

  def _text(self) -> np.ndarray:
    """int32 [length] of what attention is captured on."""
    return self._share(
      "text",
      lambda: long_context_run.full_row(
        self._corpus,
        self._config.captured_task,
        seed=self._config.seed,
        length=self._length,
      ),
    )

  def _dense_pass(self):
    """Every layer's q, k, v in the dense model, [layers, 1, length, ...]."""

    def run():
      _, budgets = self.programs.budgeted(config_lib.DENSE)
      found = self.programs.capture(self._length)(
        self._params,
        self._layer_params,
        jnp.asarray(self._text(), jnp.int32)[None],
        jnp.asarray([self._length], jnp.int32),
        budgets,
      )
      k, v = (x[:, :, : self._length] for x in (found.k, found.v))
      return found.q, k, v

    return self._share("dense_pass", run)

  def _captured(self, layer: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = self._dense_pass()
    return q[layer], k[layer], v[layer]

  def _of_layer(self, step: long_context_run.Step):
    """Layer, its arrays and its budget."""
    layer = int(step.item)
    _, budgets = self.programs.budgeted(step.pattern)
    return layer, self._captured(layer), budgets.layer(layer).budget

  def _layers(self, step: long_context_run.Step) -> dict[str, Any]:
    layer, qkv, budget = self._of_layer(step)
    dense = self._share(
      "dense_with_lse",
      lambda: self.programs.dense_with_lse(step.length)(*qkv),
      layer,
    )
    select = self.programs.select(step.pattern, layer, step.length)
    quality = self.programs.quality(step.pattern, layer, step.length)
    values = quality(select(*qkv[:2], budget), *qkv, *dense)
    return {name: float(x) for name, x in values.items()}

  def _attention_time(self, step: long_context_run.Step) -> dict[str, Any]:
    layer, qkv, budget = self._of_layer(step)

    def measure(program, *args):
      return timing.measure_compiled(
        program, *args, repeats=self._config.repeats, group_ms=_GROUP_MS
      )

    program = self.programs.attend(step.pattern, layer, step.length)
    whole = measure(program, *qkv, budget)
    select_ms = 0.0
    if step.pattern not in (config_lib.DENSE, config_lib.JAX_NN):
      select = self.programs.select(step.pattern, layer, step.length)
      select_ms = measure(select, *qkv[:2], budget).median_ms
    return {
      "select_ms": select_ms,
      # Not timed alone: one program less to compile for each mask.
      "attend_ms": whole.median_ms - select_ms,
      "total_ms": whole.median_ms,
      "peak_bytes": whole.peak_bytes,
      "compile_s": whole.compile_s,
    }

  def _prefill(self, step: long_context_run.Step) -> dict[str, Any]:
    prompt_len = self._config.prompt_len(step.length)
    _, budgets = self.programs.budgeted(step.pattern)
    timed = timing.measure_compiled(
      self.programs.prefill(step.pattern, step.length),
      self._params,
      self._layer_params,
      jnp.asarray(self._text()[-prompt_len:], jnp.int32)[None],
      jnp.asarray([prompt_len], jnp.int32),
      budgets,
      repeats=self._config.prefill_repeats,
    )
    return {"tokens": prompt_len, **dataclasses.asdict(timed)}


def compile_only(
  config: config_lib.LongContextConfig,
  model_config: models.DecoderConfig,
  stop_ids: tuple[int, ...],
) -> long_context_programs.Programs:
  """Compiles all that a run with these settings may need, without weights."""
  programs = long_context_programs.Programs(config, model_config, stop_ids)
  programs.ahead(*config.lengths)
  programs.wait()
  return programs
