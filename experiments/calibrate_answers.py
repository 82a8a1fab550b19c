# SPDX-License-Identifier: Apache-2.0
"""Finds settings of a pattern by what they cost the answers.

Recall treats all heads alike, but few of them find what a question asks for:
the others bear far sparser masks. Here each head's mask alone is made sparser,
on prompts that dense attention has answered, and the growth of the answers'
loss is measured. From these the cheapest masks are chosen whose joint growth,
measured again, stays within a tolerance at every length.

Every pattern with a budget gets one for each of its masks: UniSparse, by key
head, `top_p` or the threshold's `min_score`; XAttention, FlexPrefill, both
SampleAttentions and the oracle, by query head, `top_p`; random blocks a
density. The budgets are traced values, so one program serves every choice.
MInference, streaming and UniSparse with `top_k` have no budget by head: each
layer as a whole gets one of the settings in `scorers`.

Writes WORKDIR/calibration_TOLERANCE.json, which `attention.load_calibration`
and the method "calibrated" of `experiments.long_context` read, and
WORKDIR/records.jsonl. The same command goes on where an earlier one stopped.
"""

import time

import jax.numpy as jnp
import numpy as np
import rich.progress
from absl import app

from experiments import long_context
from experiments.frame import flags_and_configs, runs
from experiments.prefill import (
  calibrate_answers_loss,
  calibrate_answers_search,
  long_context_config,
  long_context_run,
)
from unisparse_jax import attention, evaluation, models, records, tasks

_CONFIG, _WORKDIR = flags_and_configs.define()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = calibrate_answers_search.parse(_CONFIG.value)
  folder = long_context_config.model_folder(config.model)
  identity = long_context_config.identity(config, folder)
  run = runs.begin(_WORKDIR.value, identity, free=["max_seconds"])
  console = long_context.make_console()
  # Not the code that is scored later.
  corpus = long_context_run.training_code(folder, run.workdir)
  model = models.load_hf(folder, dtype=jnp.dtype(config.dtype))
  losses = Losses(config, model, corpus, run.writer, run.found())
  num_mask_heads = config.num_mask_heads(model.config)
  if config.budget_name is None:
    console.print(f"{config.method} has no budget by head: one for each layer")
  everything = calibrate_answers_search.Choice.keep_all(
    model.config.num_layers, num_mask_heads, config.full
  )
  density, growth = one_by_one(config, losses, everything, console)

  choices = calibrate_answers_search.frontier(config, density, growth)
  single = compare_single(config, losses, everything)
  for tolerance in config.tolerances:
    chosen = sparsest(config, losses, choices, everything, tolerance)
    if chosen is None:
      console.print(f"no choice is within {tolerance} nats", highlight=False)
      continue
    choice, evidence = chosen
    path = run.workdir / f"calibration_{tolerance:g}.json"
    calibration = attention.Calibration(
      pattern=config.method,
      settings=flags_and_configs.to_dict(config.settings),
      layers=config.layer_settings(choice),
      model_sha256=long_context_config.weights_hash(folder),
      target={"nats": tolerance},
      evidence={**evidence, **single},
    )
    records.write_json(path, calibration.to_json())
    attention.load_calibration(path, model_sha256=calibration.model_sha256)
    for line in summary(tolerance, calibration):
      console.print(line, highlight=False)
    console.print(f"Calibration: {path.absolute()}", soft_wrap=True)


def one_by_one(config, losses, everything, console):
  """Density of each head with each setting, and what it alone costs.

  Args:
    config: the settings.
    losses: a `Losses`.
    everything: the choice that keeps every block.
    console: where the progress goes.

  Returns:
    float [num_layers, num_mask_heads, scorers, budgets] twice: the mean density
    over the lengths, inf where a sparser mask did as well; the largest growth
    of the loss over the lengths, in nats. Heads that `max_seconds` did not
    reach: 1 and 0 at the fullest budget.
  """
  values = config.head_budgets
  shape = (*everything.budget.shape, len(config.scorers), len(values))
  density, growth = np.full(shape, np.inf), np.zeros(shape)
  with rich.progress.Progress(
    *rich.progress.Progress.get_default_columns(),
    rich.progress.MofNCompleteColumn(),
    console=console,
  ) as progress:
    bar = progress.add_task("one head", total=int(np.prod(shape)))
    base = {n: losses(n, everything)["loss"] for n in config.lengths}
    start, num_left = time.monotonic(), 0  # prompts are made, all is compiled
    for where in np.ndindex(*shape[:3]):
      if (
        config.max_seconds is not None
        and time.monotonic() - start > config.max_seconds
      ):
        # As if it kept everything and lost nothing.
        density[*where, 0] = 1.0
        num_left += 1
        continue
      for index in reversed(range(shape[3])):  # from sparse to full
        one = everything.but(*where, values[index])
        measured = {n: losses(n, one) for n in config.lengths}
        layer, head, _ = where
        density[*where, index] = np.mean(
          [m["density"][layer][head] for m in measured.values()]
        )
        growth[*where, index] = max(
          m["loss"] - base[n] for n, m in measured.items()
        )
        if growth[*where, index] <= config.negligible:
          break
      progress.advance(bar, shape[3])
  if num_left:
    console.print(f"time is up: {num_left} heads keep the fullest budget")
  return density, growth


class Losses:
  """Losses by length and choice, from the records where they are known.

  Args:
    config: the settings.
    model: a decoder.
    corpus: code that the prompts are of.
    writer: where new ones go.
    found: records of an earlier run.
  """

  def __init__(self, config, model, corpus, writer, found):
    self._config, self._model, self._corpus = config, model, corpus
    self._writer = writer
    self._known = {(r["length"], r["choice"]): r for r in found}
    self._prompts = {}
    self._measure = calibrate_answers_loss.make_loss(model, config)

  def __call__(self, length, choice):
    key = (length, choice.key)
    if key not in self._known:
      if length not in self._prompts:
        self._prompts[length] = self._answered(length)
      start = time.perf_counter()
      measured = self._measure(self._prompts[length], choice)
      measured["seconds"] = time.perf_counter() - start
      self._writer.write(length=length, choice=choice.key, **measured)
      self._known[key] = measured
    return self._known[key]

  def _answered(self, length) -> calibrate_answers_loss.Prompts:
    """Prompts of all tasks with dense attention's greedy answers."""
    config, tokenizer = self._config, self._corpus.tokenizer
    longest = max(tasks.TASKS[task].max_new_tokens for task in config.tasks)
    dense = attention.SparseAttention(
      pattern=attention.make_pattern("dense"),
      implementation=config.implementation,
    )
    parts = []
    for task in config.tasks:
      samples = long_context_run.draw_samples(
        task,
        self._corpus,
        seed=config.seed,
        count=config.samples,
        prompt_len=length - longest,
        length=length,
      )
      tokens, lengths = evaluation.pad_prompts(samples, length - longest)
      answers = np.asarray(
        models.generate(
          self._model,
          tokens,
          max_new_tokens=longest,
          attention_fn=dense,
          eos_id=tokenizer.newline_id,
          lengths=lengths,
        )
      )
      is_newline = answers == tokenizer.newline_id
      ended = np.cumsum(is_newline, axis=1) - is_newline
      parts.append((tokens, lengths, answers, ended == 0))
    arrays = [jnp.asarray(np.concatenate(x)) for x in zip(*parts, strict=True)]
    return calibrate_answers_loss.Prompts(
      tokens=arrays[0],
      lengths=arrays[1],
      answers=arrays[2],
      is_answer=arrays[3],
    )


def sparsest(config, losses, choices, everything, tolerance):
  """The cheapest choice within a tolerance, and what was measured of it.

  Bisects over the choices, whose loss falls as they get fuller.

  Args:
    config: the settings.
    losses: a `Losses`.
    choices: (price, choice), from sparse to full.
    everything: the choice that keeps every block.
    tolerance: nats.

  Returns:
    (choice, evidence), or None where even the fullest grows by more.
  """

  def measure(index):
    price, choice = choices[index]
    rows = measure_choice(config, losses, everything, choice)
    fits = all(row["growth"] <= tolerance for row in rows.values())
    return fits, choice, {"price": price, "lengths": rows}

  low, high, best = 0, len(choices) - 1, None
  while low <= high:
    middle = (low + high) // 2
    fits, choice, evidence = measure(middle)
    if fits:
      best, high = (choice, evidence), middle - 1
    else:
      low = middle + 1
  return best


def measure_choice(config, losses, everything, choice) -> dict[str, dict]:
  """By length: what a choice costs, and how much it keeps."""
  rows = {}
  for length in config.lengths:
    base, measured = losses(length, everything), losses(length, choice)
    rows[str(length)] = {
      "growth": measured["loss"] - base["loss"],
      "exact": measured["exact"],
      "density": float(np.mean(measured["density"])),
      "layers": np.mean(measured["density"], axis=1).tolist(),
      "cost": calibrate_answers_search.cost(
        config, choice, measured["density"]
      ),
    }
  return rows


def compare_single(config, losses, everything) -> dict[str, list[dict]]:
  """Evidence on each setting for all heads alike, where it is asked for."""
  if not config.compare_single:
    return {}
  rows = []
  for scorer, budget, choice in calibrate_answers_search.alike(
    config, everything
  ):
    lengths = measure_choice(config, losses, everything, choice)
    rows.append({"scorer": scorer, "budget": budget, "lengths": lengths})
  return {"single": rows}


def summary(tolerance: float, calibration: attention.Calibration) -> list[str]:
  """Lines on what was found."""
  lines = [f"within {tolerance:g} nats an answer:"]
  for length, row in calibration.evidence["lengths"].items():
    lines.append(
      f"  {int(length):,} tokens: {row['growth']:+.3f} nats, "
      f"{row['exact']:.1%} of the answers kept, density {row['density']:.3f}, "
      f"{row['cost']:.3f} of dense attention's time"
    )
  for row in calibration.evidence.get("single", ()):
    lines.append(
      f"  scorer {row['scorer']}, {row['budget']:g} for all heads: "
      + ", ".join(
        f"{found['growth']:+.3f} nats at density {found['density']:.3f}"
        for found in row["lengths"].values()
      )
    )
  lines += [
    f"  layer {layer}: {dict(settings)}"
    for layer, settings in enumerate(calibration.layers)
  ]
  return lines


if __name__ == "__main__":
  flags_and_configs.run(main)
