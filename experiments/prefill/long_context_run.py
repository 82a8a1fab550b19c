# SPDX-License-Identifier: Apache-2.0
"""Measurements of the long-context experiment, one record each."""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.prefill import long_context_config as config_lib
from experiments.prefill import long_context_masks
from unisparse_jax import attention, data, evaluation, models, tasks
from unisparse_jax.data import sources

_NUM_TRAIN_FILES = 600  # for calibration, spread over the standard library
_NUM_OTHER_FILES = 3  # A cache has both splits, though one is read.
TIMED = ("attention_time", "prefill")  # kinds of steps whose value is a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One measurement.

  Attributes:
    kind: "answers", "next_token", "layers", "attention_time", "prefill" or
      "masks".
    pattern: label.
    length: tokens.
    item: task, or layer as text, or "".
  """

  kind: str
  pattern: str
  length: int
  item: str = ""

  @property
  def key(self) -> tuple:
    return (self.kind, self.pattern, self.length, self.item)

  def __str__(self):
    words = (self.kind, self.pattern, f"{self.length:,}", self.item)
    return " · ".join(word for word in words if word)


def key(record: dict[str, Any]) -> tuple:
  """The key of the step that a record is of."""
  return tuple(record[name] for name in ("kind", "pattern", "length", "item"))


def plan(config: config_lib.LongContextConfig, num_layers: int) -> list[Step]:
  """All measurements, in an order in which what they share is made once."""
  quality_layers = config.quality_layers or range(num_layers)
  wanted = [(config_lib.DENSE, config.reference_measure)]
  wanted += [(entry.label, entry.measure) for entry in config.entries]
  timed = any("attention_time" in measure for _, measure in wanted)
  steps = []
  for length in config.lengths:

    def add(kind: str, items: Iterable = ("",), length=length):
      for label, measure in wanted:
        if kind in measure:
          steps.extend(
            Step(kind=kind, pattern=label, length=length, item=str(item))
            for item in items
          )

    add("answers", config.tasks)
    add("next_token")
    add("layers", quality_layers)
    if config.mask_label:
      steps.append(Step(kind="masks", pattern=config.mask_label, length=length))
    baselines = [(config_lib.DENSE, config.timed_layers)]
    if length <= config.jax_nn_max_len:
      baselines.append((config_lib.JAX_NN, config.timed_layers[:1]))
    for label, layers in baselines if timed else ():
      steps.extend(
        Step(kind="attention_time", pattern=label, length=length, item=str(i))
        for i in layers
      )
    add("attention_time", config.timed_layers)
    add("prefill")
  return steps


def held_out_code(
  model: pathlib.Path, workdir: pathlib.Path
) -> data.CodeCorpus:
  """The standard library's held-out modules as a model's tokens.

  Args:
    model: folder of the checkpoint, with its tokenizer.
    workdir: the tokens are kept under it.
  """
  held_out, train = _standard_library()
  found = [*held_out, *train[:_NUM_OTHER_FILES]]
  return _tokenised(model, workdir / "corpus", found, "held_out")


def training_code(
  model: pathlib.Path, workdir: pathlib.Path
) -> data.CodeCorpus:
  """Modules of the standard library that are not held out, to choose on.

  Args:
    model: folder of the checkpoint, with its tokenizer.
    workdir: the tokens are kept under it.
  """
  held_out, train = _standard_library()
  train = train[:: max(1, len(train) // _NUM_TRAIN_FILES)]
  found = [*held_out[:_NUM_OTHER_FILES], *train]
  return _tokenised(model, workdir / "training_code", found, "train")


def _standard_library() -> tuple[list[sources.Source], list[sources.Source]]:
  """Held-out files and the others."""
  found = [source for source in sources.find_sources() if source.stdlib]
  held_out = [source for source in found if source.held_out]
  return held_out, [source for source in found if not source.held_out]


def _tokenised(model, folder, found, split: str) -> data.CodeCorpus:
  tokenizer = data.Tokenizer.load(model / "tokenizer.json")
  data.build_cache(folder, tokenizer, found=found, num_processes=1)
  return data.CodeCorpus(folder, split)


def draw_samples(
  task: str,
  corpus: data.CodeCorpus,
  *,
  seed: int,
  count: int,
  prompt_len: int,
  length: int,
) -> list[tasks.TaskSample]:
  """Prompts of a task, the same in every run.

  Args:
    task: a name in `tasks.TASKS`.
    corpus: text that the prompts are made of.
    seed: of the run.
    count: number of prompts.
    prompt_len: tokens that a prompt may have. One for all tasks leaves room for
      the longest answer, so that one compiled prefill serves them.
    length: tokens of a prompt and its answer; part of the seed.

  Returns:
    The prompts.
  """
  kind = tasks.TASKS[task]
  rng = np.random.default_rng([seed, list(tasks.TASKS).index(task), length])
  max_len = prompt_len + kind.max_new_tokens
  return [
    kind.sample(rng, corpus, corpus.tokenizer, max_len) for _ in range(count)
  ]


def answer_record(answers: Sequence[evaluation.Answer]) -> dict[str, Any]:
  """What the record of a task's answers holds beside its key."""
  return {
    "score": float(np.mean([answer.score for answer in answers])),
    "scores": [answer.score for answer in answers],
    "texts": [answer.text.rstrip("\n") for answer in answers],
    "targets": [answer.targets for answer in answers],
  }


def full_row(
  corpus: data.CodeCorpus, task: str, *, seed: int, length: int
) -> np.ndarray:
  """Text of a length without padding: a prompt with code before it, or code.

  Args:
    corpus: code, of which prompts are made as well.
    task: a name in `tasks.TASKS`; "": code alone.
    seed: of the run.
    length: tokens.

  Returns:
    int32 [length].
  """
  code_only = data.Mixture(
    **dict.fromkeys(tasks.TASKS, 0.0), code=1.0, full_row=1.0
  )
  code = data.TrainingRows(corpus, seed, length, code_only)[0]["tokens"][:-1]
  if not task:
    return code
  (sample,) = draw_samples(
    task,
    corpus,
    seed=seed,
    count=1,
    prompt_len=length,
    length=length,
  )
  prompt = np.asarray(sample.prompt_tokens, np.int32)
  return np.concatenate([code[: length - len(prompt)], prompt])


class Measurer:
  """Takes one step after another; what steps share is made once a length.

  Args:
    config: the settings.
    model: a decoder.
    corpus: held-out code.
    workdir: folder for arrays that are too large for a record.
  """

  def __init__(
    self,
    config: config_lib.LongContextConfig,
    model: models.Decoder,
    corpus: data.CodeCorpus,
    workdir: pathlib.Path,
  ):
    self._config = config
    self._model = model
    self._corpus = corpus
    self._workdir = workdir
    self._length = None
    self._shared: dict[tuple, Any] = {}

  def measure(self, step: Step) -> dict[str, Any]:
    """What the step's record holds beside its key."""
    if step.length != self._length:
      self._length, self._shared = step.length, {}
    return getattr(self, f"_{step.kind}")(step)

  def _share(self, name: str, make: Callable[[], Any], *item: Any) -> Any:
    if (name, *item) not in self._shared:
      self._shared[name, *item] = make()
    return self._shared[name, *item]

  def _answers(self, step: Step) -> dict[str, Any]:
    prompt_len = self._config.prompt_len(step.length)
    samples = self._share(
      "samples",
      lambda: draw_samples(
        step.item,
        self._corpus,
        seed=self._config.seed,
        count=self._config.samples,
        prompt_len=prompt_len,
        length=step.length,
      ),
      step.item,
    )
    answers = evaluation.answer(
      self._model,
      samples,
      self._corpus.tokenizer.decode,
      attention_fn=self._config.attention_fn(step.pattern),
      prompt_len=prompt_len,
      batch_size=self._config.batch_size,
      stop_ids=(self._corpus.tokenizer.newline_id,),
      max_new_tokens=self._config.answer_len,
    )
    return answer_record(answers)

  def _code(self) -> jax.Array:
    """int32 [code_rows, length], held-out code."""
    code_only = data.Mixture(
      **dict.fromkeys(tasks.TASKS, 0.0), code=1.0, full_row=1.0
    )
    rows = data.TrainingRows(
      self._corpus, self._config.seed, self._length, code_only
    )
    taken = [rows[i]["tokens"][:-1] for i in range(self._config.code_rows)]
    return jnp.asarray(np.stack(taken), jnp.int32)

  def _next_token(self, step: Step) -> dict[str, Any]:
    code = self._share("code", self._code)
    values = []
    for row in range(code.shape[0]):
      tokens = code[row : row + 1]
      dense_hidden = self._dense_hidden(row)
      hidden = dense_hidden
      if step.pattern != config_lib.DENSE:
        hidden = evaluation.hidden_states(
          self._model,
          tokens,
          attention_fn=self._config.attention_fn(step.pattern),
        )
      quality = evaluation.compare_hidden_states(
        self._model, tokens, hidden, dense_hidden
      )
      values.append(dataclasses.asdict(quality))
    return {
      name: float(np.mean([value[name] for value in values]))
      for name in values[0]
    }

  def _dense_pass(self):
    """Hidden states and every layer's q, k, v, of the first row of code."""
    return self._share(
      "dense_pass",
      lambda: jax.block_until_ready(
        evaluation.hidden_states_and_qkv(
          self._model,
          self._share("code", self._code)[:1],
          attention_fn=self._config.attention_fn(config_lib.DENSE),
        )
      ),
    )

  def _dense_hidden(self, row: int) -> jax.Array:
    if row == 0:
      return self._dense_pass()[0]
    return self._share(
      "dense_hidden",
      lambda: evaluation.hidden_states(
        self._model,
        self._share("code", self._code)[row : row + 1],
        attention_fn=self._config.attention_fn(config_lib.DENSE),
      ),
      row,
    )

  def _captured(self, layer: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return self._dense_pass()[1][layer]

  def _layers(self, step: Step) -> dict[str, Any]:
    layer = int(step.item)
    q, k, v = self._captured(layer)
    dense_fn = self._config.attention_fn(config_lib.DENSE)
    dense_out = self._share(
      "dense_out", lambda: jax.jit(dense_fn)(q, k, v), layer
    )
    pattern = self._config.entry(step.pattern).pattern(layer)
    quality = evaluation.layer_quality(pattern, q, k, v, dense_out)
    return dataclasses.asdict(quality)

  def _attention_time(self, step: Step) -> dict[str, Any]:
    is_jax_nn = step.pattern == config_lib.JAX_NN
    layer, num_layers = int(step.item), self._model.config.num_layers
    timed = evaluation.time_attention(
      attention.for_layer(
        self._config.attention_fn(step.pattern), layer, num_layers
      ),
      *self._captured(layer),
      repeats=1 if is_jax_nn else self._config.repeats,
    )
    return dataclasses.asdict(timed)

  def _prefill(self, step: Step) -> dict[str, Any]:
    timed = evaluation.time_prefill(
      self._model,
      self._share("code", self._code)[:1],
      self._config.attention_fn(step.pattern),
      repeats=self._config.prefill_repeats,
      warmup=1 if self._config.prefill_repeats > 1 else 0,
    )
    return dataclasses.asdict(timed)

  def _masks(self, step: Step) -> dict[str, Any]:
    """Writes the true block mass and the kept blocks of four heads."""
    entry = self._config.entry(step.pattern)
    heads, groups, masses, kept = [], [], [], []
    for layer in self._config.mask_layers:
      pattern = entry.pattern(layer)
      q, k, _ = self._captured(layer)
      mass, listed = long_context_masks.mass_and_mask(pattern, q, k)
      group = q.shape[2] // listed.shape[1]
      for head in range(q.shape[2]):
        heads.append((layer, head))
        groups.append((layer, head // group))
        masses.append(np.asarray(mass[0, head]))
        kept.append(np.asarray(listed[0, head // group]))
    chosen = long_context_masks.different_heads(np.stack(masses), groups)
    file = self._workdir / f"masks_{step.length}.npz"
    with tempfile.NamedTemporaryFile(
      dir=self._workdir, prefix=file.name, delete=False
    ) as temporary:
      np.savez_compressed(
        temporary,
        mass=np.stack([masses[i] for i in chosen]),
        kept=np.stack([kept[i] for i in chosen]),
      )
    os.replace(temporary.name, file)
    return {
      "file": file.name,
      "heads": [heads[i] for i in chosen],
      "block_q": entry.pattern(0).block_q,
    }
