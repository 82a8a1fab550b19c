# SPDX-License-Identifier: Apache-2.0
"""Compiled programs of the long-context experiment, made ahead in threads.

A card's minutes go to compilation if every pattern, budget and length is
compiled with all layers unrolled. Three things keep it short. Layers are
scanned and budgets are arrays (`models.scanned_prefill`), so one program
serves all budgets of a pattern and all layers. Threads compile what comes next
while the device works. And since no weights are needed, another process can
compile everything into the shared cache while the model is still training.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels
from experiments.prefill import long_context_config as config_lib
from experiments.prefill import long_context_shapes
from unisparse_jax import attention, evaluation, models
from unisparse_jax.models import decoder


class Programs:
  """What the measurements of one model run, by length and by template.

  Args:
    config: the settings of the run.
    model_config: of the decoder.
    stop_ids: tokens that end an answer.
  """

  def __init__(
    self,
    config: config_lib.LongContextConfig,
    model_config: models.DecoderConfig,
    stop_ids: tuple[int, ...],
  ):
    self._config, self._model_config = config, model_config
    self._stop_ids = stop_ids
    self._shapes = long_context_shapes.Shapes(config, model_config)
    self._kinds = set().union(*config.measures().values())
    dtype = jnp.dtype(config.dtype)
    model = nnx.eval_shape(
      lambda: models.Decoder(
        model_config,
        rngs=nnx.Rngs(0),
        dtype=dtype,
        param_dtype=dtype,
      )
    )
    self._graphdef, state = nnx.split(model)
    self._params = long_context_shapes.of(nnx.to_pure_dict(state))
    self._layers = long_context_shapes.of(
      jax.eval_shape(lambda p: _stacked(self._graphdef, p), self._params)
    )
    self._pool = concurrent.futures.ThreadPoolExecutor(
      max(1, config.compile_threads)
    )
    self._known: dict[Hashable, concurrent.futures.Future] = {}
    self._sizes: dict[Hashable, Any] = {}
    self._attentions: dict[Hashable, Any] = {}
    self.compile_s = 0.0  # of all threads together

  # What a measurement asks for; compiled at the first call or ahead of it.

  def params(self, model: decoder.Decoder):
    """A model's weights as the programs take them: all, and layers stacked."""
    params = nnx.to_pure_dict(nnx.state(model))
    return params, jax.jit(functools.partial(_stacked, self._graphdef))(params)

  def budgeted(self, label: str):
    """Template and budgets of a pattern by its label."""
    if label not in self._attentions:
      fn = self._config.attention_fn(label)
      num_layers = self._model_config.num_layers
      self._attentions[label] = self._take_apart(fn, num_layers)
    return self._attentions[label]

  def _take_apart(self, fn, num_layers):
    return attention.budgeted(
      fn,
      num_layers=num_layers,
      num_heads=self._model_config.num_heads,
      num_kv_heads=self._model_config.num_kv_heads,
    )

  def prefill(self, label: str, length: int) -> Callable:
    """(params, layers, tokens, lengths, budgets) -> `models.Prefilled`.

    With its residual where next tokens are compared.
    """
    fn, budgets = self.budgeted(label)
    return self._get(
      ("prefill", fn, length), lambda: self._trace_prefill(fn, budgets, length)
    )

  def capture(self, length: int) -> Callable:
    """As `prefill`, dense, of `length` tokens, with the queries."""
    fn, budgets = self.budgeted(config_lib.DENSE)
    return self._get(
      ("capture", length),
      lambda: self._trace_prefill(fn, budgets, length, keep_q=True),
    )

  def compare(self, length: int) -> Callable:
    """(params, tokens, residual, dense one) -> dict of scalars."""

    def compare(params, tokens, residual, dense_residual):
      model = nnx.merge(self._graphdef, nnx.State(params))
      return evaluation.next_token_means(
        model, tokens, model.norm(residual), model.norm(dense_residual)
      )

    def trace():
      tokens = self._shapes.tokens(self._config.prompt_len(length))
      residual = self._shapes.residual(length)
      return jax.jit(compare).trace(self._params, tokens, residual, residual)

    return self._get(("compare", length), trace)

  def decode(self, length: int) -> Callable:
    """(params, tuple of Prefilled) -> int32 [samples, answer_len]."""
    return self._get(("decode", length), lambda: self._trace_decode(length))

  def attend(self, label: str, layer: int, length: int) -> Callable:
    """(q, k, v, budget of the layer) -> out: selection and attention."""
    fn, _ = self._one_layer(label, layer)

    def attend(q, k, v, budget):
      return fn.attention(0, budget)(q, k, v)

    return self._get(
      ("attend", fn, self._budget(label).shape, length),
      lambda: jax.jit(attend).trace(
        *self._shapes.qkv(length), self._budget(label)
      ),
    )

  def select(self, label: str, layer: int, length: int) -> Callable:
    """(q, k, budget of the layer) -> BlockMask."""
    fn, _ = self._one_layer(label, layer)
    return self._get(
      ("select", fn, self._budget(label).shape, length),
      lambda: jax.jit(_selector(fn)).trace(
        *self._shapes.qkv(length)[:2], self._budget(label)
      ),
    )

  def walk(self, mask: attention.BlockMask, length: int) -> Callable:
    """(q, k, v, mask) -> out, for masks of this shape; made at the call."""

    def walk(q, k, v, mask):
      return attention.sparse_attention(
        q, k, v, mask, implementation=self._config.implementation
      )

    shapes = long_context_shapes.of(mask)
    return self._get(
      ("walk", _key(shapes), length),
      lambda: jax.jit(walk).trace(*self._shapes.qkv(length), shapes),
    )

  def quality(self, label: str, layer: int, length: int) -> Callable:
    """(mask, q, k, v, dense_out, dense_lse) -> dict of scalars."""
    mask = self._mask(label, layer, length)
    fn = functools.partial(
      evaluation.mask_quality, implementation=self._config.implementation
    )

    def trace():
      q, k, v = self._shapes.qkv(length)
      lse = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
      return jax.jit(fn).trace(mask, q, k, v, q, lse)

    return self._get(("quality", _key(mask), length), trace)

  def dense_with_lse(self, length: int) -> Callable:
    """(q, k, v) -> (out, lse) over all blocks, by the sparse back end."""

    def dense(q, k, v):
      grid = attention.BlockGrid.create(q, k, block_q=128, block_kv=128)
      mask = attention.BlockMask.full(grid)
      return pallas_kernels.block_sparse_attention(
        q,
        k,
        v,
        mask.kv_block_indices,
        mask.num_kv_blocks,
        block_q=128,
        block_kv=128,
        implementation=self._config.implementation,
      )

    return self._get(
      ("dense", length), lambda: jax.jit(dense).trace(*self._shapes.qkv(length))
    )

  # When they are compiled.

  def ahead(self, *lengths: int):
    """Starts to compile all that lengths need, in the order of the patterns.

    What passes of the whole model need comes first: no clock runs then. Each
    program is begun once: a thread that asked for another's would wait for it.
    """
    begun = set()
    for whole in (True, False):
      for length in lengths:
        for label, measure in self._config.measures().items():
          for make in self._wanted(label, measure, length, whole):
            key = (make.func, *map(self._without_budget, make.args))
            if key not in begun:
              begun.add(key)
              self._pool.submit(_quietly, make)

  def _without_budget(self, argument):
    """Of a label, what its programs differ by."""
    if not isinstance(argument, str):
      return argument
    fn, budgets = self.budgeted(argument)
    return fn, budgets.budget.shape

  def _wanted(self, label, measure, length, whole):
    """Calls that compile what a pattern needs: of the model, or of a layer."""
    if whole:
      if "answers" in measure:
        yield functools.partial(self.decode, length)
      if {"answers", "next_token", "prefill"} & set(measure):
        yield functools.partial(self.prefill, label, length)
      if "next_token" in measure:
        yield functools.partial(self.prefill, config_lib.DENSE, length)
        yield functools.partial(self.compare, length)
      return
    if label == config_lib.DENSE:
      if {"layers", "attention_time"} & self._kinds:
        yield functools.partial(self.capture, length)
        yield functools.partial(self.attend, label, 0, length)
      return
    fns = set()
    for layer in range(self._model_config.num_layers):
      fn, _ = self._one_layer(label, layer)
      if fn in fns:
        continue  # mostly all layers share theirs
      fns.add(fn)
      if {"layers", "attention_time"} & set(measure):
        yield functools.partial(self.select, label, layer, length)
      if "attention_time" in measure:
        yield functools.partial(self.attend, label, layer, length)
      if "layers" in measure:
        yield functools.partial(self.dense_with_lse, length)
        yield functools.partial(self.quality, label, layer, length)

  def wait(self) -> int:
    """Waits until nothing compiles, so that a clock may run; their number."""
    self._pool.shutdown(wait=True)
    self._pool = concurrent.futures.ThreadPoolExecutor(
      max(1, self._config.compile_threads)
    )
    return len(self._known)

  def errors(self) -> dict[Hashable, BaseException]:
    """Programs that could not be compiled."""
    failed = {}
    for key, future in self._known.items():
      if future.done() and (error := future.exception()) is not None:
        failed[key] = error
    return failed

  def close(self):
    """Gives up what has not begun to compile."""
    self._pool.shutdown(wait=False, cancel_futures=True)

  def build(self, traced: jax.stages.Traced) -> Callable:
    """The program of a trace, for the device at hand."""
    return traced.lower().compile()

  def _get(self, key: Hashable, trace: Callable[[], Any]) -> Callable:
    future = concurrent.futures.Future()
    known = self._known.setdefault(key, future)
    if known is future:
      start = time.perf_counter()
      try:
        future.set_result(self.build(trace()))
      except BaseException as error:
        future.set_exception(error)
      self.compile_s += time.perf_counter() - start
    return known.result()

  # Of one pattern's layers.

  def _budget(self, label: str):
    return long_context_shapes.of(self.budgeted(label)[1].layer(0).budget)

  def _one_layer(self, label: str, layer: int):
    """The attention of one layer alone, with its budgets."""
    if (label, layer) not in self._attentions:
      fn = attention.for_layer(
        self._config.attention_fn(label), layer, self._model_config.num_layers
      )
      self._attentions[label, layer] = self._take_apart(fn, 1)
    return self._attentions[label, layer]

  def _mask(self, label: str, layer: int, length: int):
    fn, _ = self._one_layer(label, layer)
    key = (fn, length)
    if key not in self._sizes:
      q, k, _ = self._shapes.qkv(length)
      self._sizes[key] = jax.eval_shape(
        _selector(fn), q, k, self._budget(label)
      )
    return self._sizes[key]

  def _trace_prefill(self, fn, budgets, length, *, keep_q=False):
    q_len = length if keep_q else self._config.prompt_len(length)
    capacity = long_context_shapes.capacity(length)

    def prefill(params, layers, tokens, lengths, budgets):
      model = nnx.merge(self._graphdef, nnx.State(params))
      return models.scanned_prefill(
        model,
        nnx.State(layers),
        tokens,
        lengths,
        budgets,
        attention_fn=fn,
        capacity=capacity,
        keep_q=keep_q,
        keep_residual=not keep_q and "next_token" in self._kinds,
      )

    return jax.jit(prefill).trace(
      self._params,
      self._layers,
      self._shapes.tokens(q_len),
      jax.ShapeDtypeStruct((1,), jnp.int32),
      long_context_shapes.of(budgets),
    )

  def _trace_decode(self, length):
    row = self._shapes.prefilled(length)

    def decode(params, rows):
      logits, cache = models.join_prefilled(rows)
      return models.decode(
        nnx.merge(self._graphdef, nnx.State(params)),
        logits,
        cache,
        max_new_tokens=self._config.answer_len,
        eos_id=self._stop_ids or None,
      )[0]

    # Each prompt's own cache is not needed beside the joint one.
    return jax.jit(decode).trace(self._params, (row,) * self._config.samples)


def _selector(fn: attention.BudgetedAttention):
  """(q, k, budget) -> BlockMask of an attention of one layer."""

  def select(q, k, budget):
    sparse = fn.attention(0, budget)
    assert isinstance(sparse, attention.SparseAttention)
    return sparse.pattern.select(q, k)

  return select


def _stacked(graphdef, params):
  model = nnx.merge(graphdef, nnx.State(params))
  return nnx.to_pure_dict(models.stack_layers(model))


def _key(tree: Any) -> Hashable:
  leaves, structure = jax.tree.flatten(tree)
  return structure, tuple((x.shape, x.dtype.name) for x in leaves)


def _quietly(make: Callable[[], Any]):
  """An error is kept by the program's own future, and met where it is used."""
  try:
    make()
  except Exception:
    return
