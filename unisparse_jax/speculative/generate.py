# SPDX-License-Identifier: Apache-2.0
"""Speculative generation: `models.generate` with a drafter.

The output is that of plain decoding with the same sampler and key, token for
token, up to the rounding of near-ties: a pass over several tokens may add in
another order than a pass over one. A drafter that draws at random and is
verified by rejection (`SampledChain`) keeps the distribution, not the tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels import checks
from unisparse_jax import attention, models
from unisparse_jax.models import arguments, decoder, sampling
from unisparse_jax.speculative import engine, prefill, statistics, tree
from unisparse_jax.speculative import policy as policy_lib
from unisparse_jax.speculative.drafters import base

# Prompts of similar length then share one compiled loop. With 128, attention on
# a GPU would share a row among more programs than in plain decoding.
_CAPACITY_MULTIPLE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What `generate` returns.

  Attributes:
    tokens: int32 [batch, max_new_tokens], after a row's end filled with the
      (first) eos_id, or 0 for none.
    num_tokens: int32 [batch], tokens that count, an EOS token included.
    log: of every step; see `statistics.summarize`.
  """

  tokens: Int[Array, "batch max_new_tokens"]
  num_tokens: Int[Array, " batch"]
  log: statistics.StepLog


def generate(
  target: models.Decoder | models.Flat,
  drafter: base.Drafter,
  tokens: Int[Array | np.ndarray, "batch q_len"],
  *,
  max_new_tokens: int | Int[Array | np.ndarray, " batch"],
  shape: tree.TreeShape = tree.TreeShape(),
  policy: policy_lib.Policy | None = None,
  sampler: sampling.Sampler = sampling.Greedy(),
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
  drafter_attention_fn: attention.AttentionFn | None = None,
  eos_id: int | Sequence[int] | None = None,
  lengths: Int[Array | np.ndarray, " batch"] | None = None,
  rng_key: Array | None = None,
  reference: Int[Array | np.ndarray, "batch new_tokens"] | None = None,
  stop: Sequence[str] = (),
  detokenize: Callable[[list[int]], str] | None = None,
  steps_per_chunk: int = 32,
  capacity: int | None = None,
  chunk: int | None = None,
  log_trees: bool = False,
  check_drafter: bool = True,
) -> Result:
  """New tokens after each row of a right-padded batch of prompts.

  Args:
    target: the model whose output is produced; its `Flat` spares repeated
      calls some milliseconds each.
    drafter: proposes tokens.
    tokens: int [batch, q_len], right-padded.
    max_new_tokens: at least 1; for all rows, or [batch].
    shape: sizes of draft trees.
    policy: sizes each step's tree; default: the whole of `shape`.
    sampler: how tokens are drawn.
    attention_fn: how target and drafter attend in the prompt.
    drafter_attention_fn: for the drafter; default: attention_fn, but dense
      where that has settings for every layer of the target.
    eos_id: token, or tokens, that end a row.
    lengths: int [batch], valid tokens of each row; default q_len.
    rng_key: as `models.generate`.
    reference: int [batch, largest max_new_tokens], what the rows are taken to
      write, -1 where they write their own: to measure acceptance on a given
      text, or methods on one text. All else is computed as without.
    stop: texts that end a row; the token that completes one is the last that
      counts. Needs `detokenize`, and looks after every chunk of steps.
    detokenize: text of a list of tokens.
    steps_per_chunk: steps between two looks.
    capacity: slots of the target's cache; default: what is needed.
    chunk: tokens per pass of the target over the prompt; default all.
    log_trees: keep the trees of every step, for calibration.
    check_drafter: compare the policy's drafter_hash; reads all weights.

  Returns:
    See `Result`.

  Raises:
    ValueError: an argument is off; the message names it. Nothing has run then.
  """
  checks.check_positive_int("steps_per_chunk", steps_per_chunk)
  checks.require(
    not stop or detokenize is not None,
    "detokenize",
    "be given with stop",
    detokenize,
  )
  session = prepare(
    target,
    drafter,
    tokens,
    max_new_tokens=max_new_tokens,
    shape=shape,
    policy=policy,
    sampler=sampler,
    attention_fn=attention_fn,
    drafter_attention_fn=drafter_attention_fn,
    eos_id=eos_id,
    lengths=lengths,
    rng_key=rng_key,
    reference=reference,
    capacity=capacity,
    chunk=chunk,
    log_trees=log_trees,
    check_drafter=check_drafter,
  )
  if not stop:
    return session.run().result()
  assert detokenize is not None, "checked above"
  for _ in session.chunks(steps_per_chunk):
    session.stop_at(stop, detokenize)
  return session.result()


def prepare(
  target: models.Decoder | models.Flat,
  drafter: base.Drafter,
  tokens: Int[Array | np.ndarray, "batch q_len"],
  *,
  max_new_tokens: int | Int[Array | np.ndarray, " batch"],
  shape: tree.TreeShape = tree.TreeShape(),
  policy: policy_lib.Policy | None = None,
  sampler: sampling.Sampler = sampling.Greedy(),
  attention_fn: attention.AttentionFn = attention.DenseAttention(),
  drafter_attention_fn: attention.AttentionFn | None = None,
  eos_id: int | Sequence[int] | None = None,
  lengths: Int[Array | np.ndarray, " batch"] | None = None,
  rng_key: Array | None = None,
  reference: Int[Array | np.ndarray, "batch new_tokens"] | None = None,
  capacity: int | None = None,
  chunk: int | None = None,
  log_trees: bool = False,
  check_drafter: bool = True,
) -> "Session":
  """Checks everything and runs the prompts; arguments as `generate`.

  For streaming, and for timing prefill and decoding apart.
  """
  flat_target = models.flat(target)
  target = flat_target.module
  tokens = arguments.as_tokens(tokens)
  batch, q_len = tokens.shape
  decoder.check_len("tokens", q_len, target.config)
  vocab_size = target.config.vocab_size
  if policy is None:
    policy = policy_lib.Fixed(
      depth=jnp.int32(shape.max_depth), nodes=jnp.int32(shape.max_nodes - 1)
    )
  limit = arguments.as_limits(max_new_tokens, batch)
  new_tokens = int(limit.max())
  total = q_len + new_tokens
  decoder.check_len("tokens and max_new_tokens", total, target.config)
  lengths = arguments.as_lengths(lengths, batch, q_len)
  if lengths is None:
    lengths = jnp.full((batch,), q_len, jnp.int32)
  arguments.check_hashable("attention_fn", attention_fn)
  arguments.check_hashable("drafter_attention_fn", drafter_attention_fn)
  arguments.check_hashable("sampler", sampler)
  checks.require(
    rng_key is not None or not sampler.needs_key,
    "rng_key",
    "be given for this sampler",
    rng_key,
  )
  reference = arguments.as_reference(reference, batch, new_tokens, vocab_size)
  eos_ids = arguments.as_eos_ids(eos_id, vocab_size)
  checks.require(
    shape.width <= vocab_size,
    "width",
    "be at most the vocabulary",
    shape.width,
    f"width <= {vocab_size}",
  )
  checks.require(
    not shape.packed or shape.packed[-1] >= batch,
    "packed",
    "leave room for the root of every row",
    shape.packed,
    f"a last size of at least {batch}",
  )
  if chunk is not None:
    checks.check_positive_int("chunk", chunk)
    chunk = int(chunk) if chunk < q_len else None
  # A step writes a whole path past what is known.
  room = engine.room_behind(shape)
  needed = total + room
  if capacity is None:
    capacity = -(-needed // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE
  checks.check_positive_int("capacity", capacity)
  checks.require(
    capacity >= needed,
    "capacity",
    "hold the prompt, the new tokens and what steps write behind",
    capacity,
    f"capacity >= {q_len} + {new_tokens} + {room}",
  )
  drafter.check(target, shape)
  policy.check(shape)
  if getattr(drafter, "gives_probabilities", False):
    _check_rejection(shape, policy, sampler, reference)
  if check_drafter and policy.drafter_hash is not None:
    got = base.fingerprint(drafter)
    checks.require(
      policy.drafter_hash == got,
      "policy",
      "be fitted for this drafter",
      policy.drafter_hash,
      f"drafter_hash={got!r}",
    )
  if policy.declines:
    drafter = base.NoDrafter()
  flat_drafter = models.flat(drafter)
  keys = None
  if sampler.needs_key:
    assert rng_key is not None, "checked above"
    keys = sampling.row_keys(rng_key, batch)
  settings = engine.Settings(
    shape=shape,
    sampler=sampler,
    eos_ids=eos_ids,
    capacity=int(capacity),
    slack=engine.slack_behind(policy),
    max_steps=new_tokens,
    log_trees=log_trees,
    chunk=chunk,
  )
  state = prefill.prefill(
    flat_target,
    flat_drafter,
    policy,
    tokens,
    lengths,
    lengths + limit,
    keys,
    reference,
    attention_fn=attention_fn,
    settings=settings,
    drafter_attention_fn=drafter_attention_fn,
  )
  return Session(
    target=flat_target,
    drafter=flat_drafter,
    policy=policy,
    settings=settings,
    prompt_lengths=lengths,
    max_new_tokens=new_tokens,
    state=state,
  )


@dataclasses.dataclass(kw_only=True)
class Session:
  """A batch that is being decoded; its state is replaced as it advances.

  Attributes:
    target: see `generate`; flattened.
    drafter: likewise.
    policy: see `generate`.
    settings: what the loop is compiled for.
    prompt_lengths: int32 [batch].
    max_new_tokens: columns of the result.
    state: current; its buffers are given to the next call.
  """

  target: models.Flat[models.Decoder]
  drafter: models.Flat[base.Drafter]
  policy: policy_lib.Policy
  settings: engine.Settings
  prompt_lengths: Int[Array, " batch"]
  max_new_tokens: int
  state: engine.DecodeState

  def run(self, num_steps: int | None = None) -> "Session":
    """Decodes to the end, or for some steps, in one call of the device."""
    steps = self.settings.max_steps if num_steps is None else num_steps
    self.state = engine.decode(
      self.target,
      self.drafter,
      self.policy,
      self.state,
      np.int32(steps),
      settings=self.settings,
    )
    return self

  def chunks(self, num_steps: int) -> Iterator["Session"]:
    """Decodes to the end and yields itself after every `num_steps` steps."""
    yield self  # a row may end with its first token
    while not bool(jnp.all(self.state.done)):
      yield self.run(num_steps)

  def new_tokens(self) -> list[list[int]]:
    """The tokens of every row so far, on the host."""
    tokens, ends, starts = jax.device_get(
      (self.state.tokens, self.state.lengths, self.prompt_lengths)
    )
    return [
      row[start:end].tolist()
      for row, start, end in zip(tokens, starts, ends, strict=True)
    ]

  def stop_at(self, stop: Sequence[str], detokenize: Callable) -> "Session":
    """Ends the rows whose text holds one of `stop`, at the token it ends in."""
    lengths, done = (np.array(x) for x in (self.state.lengths, self.state.done))
    starts = np.asarray(self.prompt_lengths)
    for row, tokens in enumerate(self.new_tokens()):
      count = _first_stop(tokens, stop, detokenize)
      if count is not None:
        lengths[row], done[row] = starts[row] + count, True
    self.state = dataclasses.replace(
      self.state, lengths=jnp.asarray(lengths), done=jnp.asarray(done)
    )
    return self

  def result(self) -> Result:
    """What there is so far; no transfer from the device."""
    fill = self.settings.eos_ids[0] if self.settings.eos_ids else 0
    tokens = _new_tokens(
      self.state.tokens,
      self.prompt_lengths,
      self.state.lengths,
      max_new_tokens=self.max_new_tokens,
      fill=fill,
    )
    return Result(
      tokens=tokens,
      num_tokens=self.state.lengths - self.prompt_lengths,
      log=self.state.log,
    )


def _first_stop(tokens, stop, detokenize) -> int | None:
  """Fewest tokens whose text holds a stop text, by bisection."""

  def found(count):
    text = detokenize(tokens[:count])
    return any(s in text for s in stop)

  if not found(len(tokens)):
    return None
  low, high = 0, len(tokens)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if found(middle) else (middle, high)
  return high


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "fill"))
def _new_tokens(tokens, starts, ends, *, max_new_tokens, fill):
  index = jnp.arange(max_new_tokens, dtype=jnp.int32)[None, :]
  index = starts[:, None] + index
  out = jnp.take_along_axis(tokens, index, axis=1, mode="clip")
  return jnp.where(index < ends[:, None], out, fill)


def _check_rejection(shape, policy, sampler, reference):
  checks.require(
    reference is None,
    "reference",
    "be None where drafts are drawn at random",
    type(reference).__name__,
  )
  checks.require(
    isinstance(policy, policy_lib.Fixed),
    "policy",
    "be Fixed where drafts are drawn at random",
    type(policy).__name__,
  )
  checks.require(
    not shape.packed,
    "packed",
    "be empty where drafts are drawn at random",
    shape.packed,
  )
  checks.require(
    sampler.needs_key,
    "sampler",
    "draw at random where drafts are",
    sampler,
    "a Temperature, or another drafter for greedy decoding",
  )
