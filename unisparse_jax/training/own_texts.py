# SPDX-License-Identifier: Apache-2.0
"""Texts that a model wrote itself: what its draft head is trained on.

A head that is trained on other text meets, when it drafts, words that the
target would not have chosen.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from unisparse_jax import attention, models
from unisparse_jax.training import config as config_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextGroup:
  """Texts of one row length.

  Attributes:
    tokens: uint16 or int32 [rows, row_len], right-padded with junk.
    starts: int32 [rows], where the model's own tokens begin.
    ends: int32 [rows], where they end.
    labels: int32 [rows], index of the domain.
  """

  tokens: np.ndarray
  starts: np.ndarray
  ends: np.ndarray
  labels: np.ndarray

  @property
  def num_rows(self) -> int:
    return self.tokens.shape[0]

  @property
  def row_len(self) -> int:
    return self.tokens.shape[1]

  @property
  def num_written(self) -> int:
    """Tokens that the model wrote."""
    return int(np.sum(self.ends - self.starts))

  @property
  def longest(self) -> int:
    """Most tokens that the model wrote in a row."""
    return int(np.max(self.ends - self.starts))

  def take(self, rows) -> dict[str, np.ndarray]:
    """Batch of `rows`: tokens and weights, 1 on the model's own tokens."""
    index = np.arange(self.row_len)[None, :]
    own = (index >= self.starts[rows, None]) & (index < self.ends[rows, None])
    return {
      "tokens": self.tokens[rows].astype(np.int32),
      "weights": own.astype(np.float32),
    }

  def save(self, path: pathlib.Path | str):
    """Writes beside `path`, then renames."""
    path = pathlib.Path(path)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **vars(self))
    temporary.replace(path)

  @classmethod
  def load(cls, path: pathlib.Path | str) -> "TextGroup":
    """Reads what `save` wrote."""
    with np.load(path) as arrays:
      return cls(**{name: arrays[name] for name in arrays})


def write_texts(
  model: models.Decoder,
  prompts: Sequence[np.ndarray],
  *,
  prompt_len: int,
  new_tokens: int,
  temperatures: np.ndarray,
  rng_key: Array,
  eos_id: int,
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Lets a model continue a batch of prompts, compiled once per shape.

  Args:
    model: a decoder.
    prompts: int arrays of 1 to prompt_len tokens.
    prompt_len: rows are padded to it.
    new_tokens: most tokens written to each; a row ends with its eos_id.
    temperatures: float32 [batch], 0: the likeliest token; may differ by row.
    rng_key: source of the draws.
    eos_id: token that ends a row.
    attention_fn: of the prefill.

  Returns:
    tokens int32 [batch, prompt_len + new_tokens], prompt and own tokens side by
    side; starts and ends int32 [batch].
  """
  batch = len(prompts)
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  config_lib.check_count("prompt_len", prompt_len, least=int(lengths.max()))
  tokens = np.zeros((batch, prompt_len + new_tokens), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  written, counts = _write(
    model,
    jnp.asarray(tokens[:, :prompt_len]),
    jnp.asarray(lengths),
    jnp.asarray(temperatures, jnp.float32),
    rng_key,
    new_tokens=new_tokens,
    eos_id=eos_id,
    attention_fn=attention_fn,
  )
  written, counts = np.asarray(written), np.asarray(counts)
  for row, start, count, new in zip(
    tokens, lengths, counts, written, strict=True
  ):
    row[start : start + count] = new[:count]
  return tokens, lengths, lengths + counts


@functools.partial(
  jax.jit, static_argnames=("new_tokens", "eos_id", "attention_fn")
)
def _write(
  model,
  tokens: Int[Array, "batch prompt_len"],
  lengths: Int[Array, " batch"],
  temperatures: Float[Array, " batch"],
  rng_key,
  *,
  new_tokens: int,
  eos_id: int,
  attention_fn: Any,
):
  batch, prompt_len = tokens.shape
  cache = models.KVCache.init(
    model.config,
    batch=batch,
    capacity=prompt_len + new_tokens + 1,
    dtype=model.dtype,
  )
  logits, cache = model(
    tokens,
    cache=cache,
    attention_fn=attention_fn,
    lengths=lengths,
    logits_for="last",
    cache_is_empty=True,
  )

  own = jnp.ones((batch, 1, 1), bool)

  def draw(step, logits):
    noise = jax.random.gumbel(
      jax.random.fold_in(rng_key, step), logits.shape, jnp.float32
    )
    noisy = logits + temperatures[:, None] * noise
    return jnp.argmax(noisy, axis=-1).astype(jnp.int32)

  def is_running(carry):
    step, _, done, *_ = carry
    return (step < new_tokens) & ~jnp.all(done)

  def body(carry):
    step, logits, done, written, counts, cache = carry
    token = jnp.where(done, eos_id, draw(step, logits))
    written = lax.dynamic_update_slice(written, token[:, None], (0, step))
    counts = counts + jnp.where(done, 0, 1)
    done = done | (token == eos_id)
    out = models.tree_forward(
      model, token[:, None], cache.lengths[:, None], own, cache
    )
    cache = cache.append(out.k, out.v, jnp.where(done, 0, 1), num_slots=1)
    logits = model.logits(out.hidden[:, 0])
    return step + 1, logits, done, written, counts, cache

  carry = (
    jnp.int32(0),
    logits,
    jnp.zeros((batch,), bool),
    jnp.full((batch, new_tokens), eos_id, jnp.int32),
    jnp.zeros((batch,), jnp.int32),
    models.TreeCache.from_cache(cache),
  )
  _, _, _, written, counts, _ = lax.while_loop(is_running, body, carry)
  return written, counts


def save_groups(
  groups: dict[str, TextGroup], folder: pathlib.Path | str, about: dict
):
  """One file a group; `about.json` is written last and marks completeness."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for name, group in groups.items():
    group.save(folder / f"{name}.npz")
  text = json.dumps({**about, "groups": list(groups)}, indent=2)
  (folder / "about.json").write_text(text + "\n", encoding="utf-8")


def load_groups(folder: pathlib.Path | str) -> dict[str, TextGroup]:
  """What `save_groups` wrote, or what a stopped writer left.

  Raises:
    ValueError: there are no texts.
  """
  files = sorted(pathlib.Path(folder).glob("*.npz"))
  files = [file for file in files if not file.name.endswith(".tmp.npz")]
  if not files:
    raise ValueError(f"folder must hold texts; got folder={folder} without.")
  return {file.stem: TextGroup.load(file) for file in files}
