# SPDX-License-Identifier: Apache-2.0
"""Trains the decoder that ships with the repository, on code and 13 tasks.

Builds the tokenizer and the tokenised corpus under the workdir if they are
missing, trains by the length curriculum of the config, evaluates on held-out
modules and writes the model in the Hugging Face layout to WORKDIR/model.

With `initial`, the folder of a model, it begins with that one's weights, for
example to learn longer contexts.

The same command goes on where an earlier one stopped, whatever stopped it.
"""

import dataclasses
import functools
import logging

import jax.numpy as jnp
from absl import app

from experiments.frame import flags_and_configs
from experiments.prefill import long_context_config
from experiments.training import code_data
from unisparse_jax import attention, data, models, records, training

_LOG = logging.getLogger("experiments.train_decoder")
_CONFIG, _WORKDIR = flags_and_configs.define()
_SECTIONS = ("model", "train", "data", "eval", "initial")
_DATA_KEYS = (
  *("seed", "packages", "extra_directories", "mixture", "tokenizer"),
  *("answer_weights", "cache"),
)
_EVAL_KEYS = ("seq_len", "rows", "batch_size", "task_lens", "task_rows")


def make_rows(corpus, seed, mixture, answer_weights, index, stage):
  """Rows of one stage; each stage has its own.

  Long rows hold few answers among much code: `answer_weights`, one a stage,
  may give them the more weight. None: that of the mixture.
  """
  if answer_weights:
    mixture = dataclasses.replace(mixture, answer_weight=answer_weights[index])
  return data.TrainingRows(corpus, 1000 * seed + index, stage.seq_len, mixture)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = flags_and_configs.to_dict(_CONFIG.value)
  flags_and_configs.check_keys("config", config, _SECTIONS)
  flags_and_configs.check_keys("config.data", config["data"], _DATA_KEYS)
  flags_and_configs.check_keys("config.eval", config["eval"], _EVAL_KEYS)
  make = flags_and_configs.to_dataclass
  model_config = make(
    models.DecoderConfig, config["model"], name="config.model"
  )
  train_config = make(
    training.TrainConfig, config["train"], name="config.train"
  )
  mixture = make(
    data.Mixture, config["data"]["mixture"], name="config.data.mixture"
  )
  answer_weights = tuple(config["data"].get("answer_weights", ()))
  if answer_weights and len(answer_weights) != len(train_config.stages):
    raise ValueError(
      "config.data.answer_weights must have one value for each stage; got "
      f"{answer_weights} for {len(train_config.stages)} stages."
    )
  settings, initial_folder = {"data": config["data"]}, None
  if config.get("initial"):
    initial_folder = long_context_config.model_folder(config["initial"])
    training.check_initial(models.load_hf_config(initial_folder), model_config)
    settings["initial"] = long_context_config.weights_hash(initial_folder)
  workdir = records.claim_workdir(
    _WORKDIR.value,
    config,
    free=[f"train.{name}" for name in training.RUN_CONTROL_FIELDS] + ["eval"],
  )
  flags_and_configs.start_jax(workdir)
  tokenizer_file, corpus_folder = code_data.prepare_corpus(
    config["data"], model_config.vocab_size, workdir / "data"
  )
  corpus = data.CodeCorpus(corpus_folder, "train")
  held_out = data.CodeCorpus(corpus_folder, "held_out")
  if mixture.docs:
    for split in (corpus, held_out):
      found = data.domains.prepare_docs(split)
      _LOG.info("%d tokens of documentation, %s", found, split.split)
  _LOG.info(
    "%d training tokens, %d held out", corpus.num_tokens, held_out.num_tokens
  )
  attention_fn = attention.DenseAttention(implementation=train_config.attention)
  result = training.train(
    train_config,
    model_config,
    functools.partial(
      make_rows, corpus, config["data"]["seed"], mixture, answer_weights
    ),
    workdir / "train",
    settings=settings,
    evaluate=code_data.make_evaluate(config["eval"], held_out, attention_fn),
    attention_fn=attention_fn,
    initial=initial_folder
    and models.load_hf(initial_folder, dtype=jnp.float32),
  )
  _LOG.info(
    "stopped at step %d of %d after %.0f s: %s",
    result.step,
    train_config.total_steps,
    result.seconds,
    result.reason,
  )
  # A run on a budget that was told to stop leaves what it has.
  is_cut = train_config.fit_budget and result.reason.startswith("SIG")
  if result.finished or is_cut:
    tokenizer = corpus.tokenizer
    folder = training.export(
      result.model,
      workdir / "model",
      training_config={**config, "train_tokens": train_config.total_tokens},
      tokenizer_file=tokenizer_file,
      metrics_file=workdir / "train" / "metrics.jsonl",
      summary=result.evaluation,
      extra={
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
      },
    )
    _LOG.info("the model is in %s", folder)


if __name__ == "__main__":
  flags_and_configs.run(main)
