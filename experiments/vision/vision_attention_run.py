# SPDX-License-Identifier: Apache-2.0
"""Measurements of the vision experiment, one record each."""

import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.vision import vision_attention_config as config_lib
from experiments.vision import vision_attention_data as data_lib
from experiments.vision import vision_attention_model as model_lib
from unisparse_jax import attention, evaluation

_MEASURED = 1_000_000  # apart from the steps of training, in a seed

Step = tuple[str, str, str]  # kind, label of a point, site or where


def key(record: dict[str, Any]) -> Step:
  """The step that a record is of."""
  return (record["kind"], record["pattern"], record["item"])


class Measurer:
  """Takes measurements of a trained reader.

  Args:
    config: the settings.
    params: of the reader.
    digits: those to test on.
    workdir: folder for arrays that are too large for a record.
  """

  def __init__(
    self,
    config: config_lib.VisionConfig,
    params,
    digits: data_lib.Digits,
    workdir: pathlib.Path,
  ):
    self._config = config
    self._params = params
    self._workdir = workdir
    self._videos = [
      data_lib.draw(
        np.random.default_rng([config.seed, _MEASURED + index]),
        digits,
        config.video,
        batch=1,
        num_frames=config.num_frames,
        num_questions=config.num_questions,
      )
      for index in range(config.num_videos)
    ]
    self._memory_of: dict[str, list[jax.Array]] = {}
    self._dense_logits: np.ndarray | None = None

  def steps(self) -> Iterator[Step]:
    """All measurements but of time, those that share work together."""
    config = self._config
    refused = self.refusals
    yield from (("refused", label, site) for label, site in refused)
    if "quality" in config.measures:
      yield ("answers", config_lib.DENSE, "both")
      for label, (sweep, _) in config.points.items():
        sites = [s for s in sweep.sites if (label, s) not in refused]
        wheres = list(sites)
        if len(sites) == len(config_lib.SITES):
          wheres.append("both")
        yield from (("answers", label, where) for where in wheres)
        yield from (("layers", label, site) for site in sites)
      if config.mask_label:
        yield ("masks", config.mask_label, "self")

  def times(self, labels: Mapping[str, Sequence[str]]) -> Iterator[Step]:
    """Times of dense attention and of some points.

    Args:
      labels: {site: labels of the points}.
    """
    for site in labels if "time" in self._config.measures else ():
      for label in (config_lib.DENSE, *labels[site]):
        yield ("attention_time", label, site)

  def point(self, step: Step) -> dict[str, str]:
    """By site, the attention that a step is about, as text."""
    _, label, item = step
    return {
      site: repr(self._config.attention_fn(label, site))
      for site in (config_lib.SITES if item == "both" else (item,))
    }

  def measure(self, step: Step) -> dict[str, Any]:
    """What the step's record holds beside its key."""
    kind, label, item = step
    return getattr(self, f"_{kind}")(label, item)

  @functools.cached_property
  def refusals(self) -> dict[tuple[str, str], str]:
    """Why a point does not serve a site, by (label, site)."""
    heads = self._config.model.num_heads
    dim = self._config.model.embed_dim // heads
    found = {}
    for label, (sweep, _) in self._config.points.items():
      for site in sweep.sites:
        q_len, kv_len = self._config.num_questions, self._config.num_tokens
        shapes = [
          jax.ShapeDtypeStruct((1, length, heads, dim), jnp.float32)
          for length in (kv_len if site == "self" else q_len, kv_len)
        ]
        select = self._config.pattern(label, site).select
        try:
          jax.eval_shape(functools.partial(select, causal=False), *shapes)
        except ValueError as error:
          found[label, site] = str(error)
    return found

  def _refused(self, label, site) -> dict[str, Any]:
    return {"reason": self.refusals[label, site]}

  def _answers(self, label, where) -> dict[str, Any]:
    """Accuracy of the answers, and how far they are from dense ones."""
    sites = config_lib.SITES if where == "both" else (where,)
    labels = {
      site: label if site in sites else config_lib.DENSE
      for site in config_lib.SITES
    }
    logits = self._logits(labels["self"], labels["cross"])
    dense = self._logits(config_lib.DENSE, config_lib.DENSE)
    answers, kinds = (
      np.stack([getattr(video, name)[0] for video in self._videos])
      for name in ("answers", "kinds")
    )
    is_right = logits.argmax(-1) == answers
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (dense, logits))
    return {
      "score": float(is_right.mean()),
      **{
        kind: float(is_right[kinds == index].mean())
        for index, kind in enumerate(data_lib.KINDS)
      },
      "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
      "agreement": float((logits.argmax(-1) == dense.argmax(-1)).mean()),
      "num_questions": int(is_right.size),
    }

  def _memories(self, label) -> list[jax.Array]:
    """What the encoder makes of each video, with a point's attention."""
    if label not in self._memory_of:
      # Dense ones are asked for again and again, others in a row.
      self._memory_of = {
        name: kept
        for name, kept in self._memory_of.items()
        if name == config_lib.DENSE
      }
      fn = self._config.attention_fn(label, "self")
      self._memory_of[label] = [
        encode(self._params, video.pixels, video.times, fn, self._sizes)
        for video in self._videos
      ]
    return self._memory_of[label]

  def _logits(self, self_label, cross_label) -> np.ndarray:
    """float32 [num_videos, num_questions, num_digits]."""
    if self_label == cross_label == config_lib.DENSE:
      if self._dense_logits is None:
        self._dense_logits = self._decoded(config_lib.DENSE, config_lib.DENSE)
      return self._dense_logits
    return self._decoded(self_label, cross_label)

  def _decoded(self, self_label, cross_label) -> np.ndarray:
    fn = self._config.attention_fn(cross_label, "cross")
    return np.stack(
      [
        np.asarray(
          decode(
            self._params,
            memory,
            video.examples,
            video.asked_times,
            video.asked_tiles,
            fn,
            self._sizes,
          )[0]
        )
        for memory, video in zip(
          self._memories(self_label), self._videos, strict=True
        )
      ]
    )

  @property
  def _sizes(self):
    return (self._config.model, self._config.video)

  @functools.cached_property
  def _captured(self) -> list[dict[str, list[tuple]]]:
    """By video and site, the (q, k, v) of each layer of the dense reader."""
    fn = self._config.attention_fn(config_lib.DENSE, "self")
    return [
      capture(self._params, vars(video), fn, self._sizes)
      for video in self._videos[: self._config.num_quality_videos]
    ]

  @functools.cached_property
  def _dense_outputs(self) -> list[dict[str, list]]:
    fn = self._config.attention_fn(config_lib.DENSE, "self")
    attend = jax.jit(functools.partial(fn, causal=False))
    return [
      {site: [attend(*qkv) for qkv in layers[site]] for site in layers}
      for layers in self._captured
    ]

  def _layers(self, label, site) -> dict[str, Any]:
    """Recall and density, mean over layers and videos; the worst of worst."""
    pattern = self._config.pattern(label, site)
    found = [
      dataclasses.asdict(
        evaluation.layer_quality(pattern, *qkv, out, causal=False)
      )
      for layers, outs in zip(self._captured, self._dense_outputs, strict=True)
      for qkv, out in zip(layers[site], outs[site], strict=True)
    ]
    num_layers = len(self._captured[0][site])
    mean = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
    by_layer = [
      {
        name: float(np.mean([f[name] for f in found[layer::num_layers]]))
        for name in ("density", "recall")
      }
      for layer in range(num_layers)
    ]
    return mean | {"cra": min(f["cra"] for f in found), "by_layer": by_layer}

  def _attention_time(self, label, site) -> dict[str, Any]:
    """Of the last layer, in which most of what is sought has been found."""
    timed = evaluation.time_attention(
      self._config.attention_fn(label, site),
      *self._captured[0][site][-1],
      causal=False,
      repeats=self._config.repeats,
    )
    return dataclasses.asdict(timed)

  def _masks(self, label, site) -> dict[str, Any]:
    """Writes a video, its true block mass, and the kept blocks of one head.

    The head and layer are those that give most of their attention to the tiles
    that the empty ones of a replay are to find.
    """
    del site
    pattern = self._config.pattern(label, "self")
    video = self._videos[0]
    sources = video.tile_sources[0]
    seeking = np.flatnonzero(sources != np.arange(len(sources)))
    best = (-1.0, 0, 0)
    layers = self._captured[0]["self"]
    for layer, (q, k, _) in enumerate(layers):
      given = np.asarray(_probability(q, k, seeking, sources[seeking]))
      for head, share in enumerate(given.mean(1)):
        best = max(best, (float(share), layer, head))
    share, layer, head = best
    q, k, _ = layers[layer]
    mass, kept = _mass_and_mask(pattern, q, k)
    mask_head = head * kept.shape[1] // q.shape[2]
    file = self._workdir / "masks.npz"
    with tempfile.NamedTemporaryFile(
      dir=self._workdir, prefix=file.name, delete=False
    ) as temporary:
      np.savez_compressed(
        temporary,
        pixels=video.pixels[0],
        sources=sources,
        mass=np.asarray(mass[0, head]),
        kept=np.asarray(kept[0, mask_head]),
      )
    os.replace(temporary.name, file)
    return {
      "file": file.name,
      "layer": layer,
      "head": head,
      "mass_on_what_is_sought": share,
      "blocks": (pattern.block_q, pattern.block_kv),
    }


class Recorder:
  """An attention that keeps what it is given."""

  def __init__(self, inner: attention.AttentionFn):
    self.calls: list[tuple] = []
    self._inner = inner

  def __call__(self, q, k, v, **where):
    self.calls.append((q, k, v))
    return self._inner(q, k, v, **where)


def _reader(params, sizes, self_attention, cross_attention):
  return model_lib.with_attention(
    params,
    *sizes,
    self_attention=self_attention,
    cross_attention=cross_attention,
  )


@functools.partial(jax.jit, static_argnames=("fn", "sizes"))
def encode(params, pixels, times, fn, sizes):
  """Memory [batch, num_tokens, embed_dim] of a reader that attends by `fn`."""
  return _reader(params, sizes, fn, fn).encode(pixels, times)


@functools.partial(jax.jit, static_argnames=("fn", "sizes"))
def decode(params, memory, examples, asked_times, asked_tiles, fn, sizes):
  """Logits [batch, num_questions, num_digits]; questions look by `fn`."""
  reader = _reader(params, sizes, fn, fn)
  return reader.decode(memory, examples, asked_times, asked_tiles)


@functools.partial(jax.jit, static_argnames=("fn", "sizes"))
def capture(params, video, fn, sizes):
  """{site: (q, k, v) of each layer} of a batch of videos, as `vars(Videos)`."""
  recorders = {site: Recorder(fn) for site in config_lib.SITES}
  reader = _reader(params, sizes, recorders["self"], recorders["cross"])
  memory = reader.encode(video["pixels"], video["times"])
  reader.decode(
    memory, video["examples"], video["asked_times"], video["asked_tiles"]
  )
  return {site: recorder.calls for site, recorder in recorders.items()}


@jax.jit
def _probability(q, k, queries, keys):
  """Softmax weight of one key for each of some queries: [heads, queries]."""
  attn_logits = q.shape[-1] ** -0.5 * jnp.einsum(
    "qhd,khd->hqk", q[0, queries], k[0], preferred_element_type=jnp.float32
  )
  p = jax.nn.softmax(attn_logits, axis=-1)
  return jnp.take_along_axis(p, keys[None, :, None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def _mass_and_mask(pattern, q, k):
  mask = pattern.select(q, k, causal=False)
  return attention.metrics.block_mass(q, k, mask.grid), mask.to_dense()
