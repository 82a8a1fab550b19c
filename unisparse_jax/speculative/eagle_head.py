# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 style draft head: one decoder layer on fused target features.

Slot i reads the target's features g of position i and the embedding of token
i + 1, has RoPE position i, and predicts token i + 2. Where the target has not
been yet, its own output of the slot before takes the place of g.

  g = fuse([low; middle; high])
  a = layer([norm(embed(token)); norm(g)]) + g
  logits = lm_head(norm(a))

Source: Li et al., 2025, "EAGLE-3", arXiv 2503.01840, section 3. Differs from it
in: `fuse` starts as a copy of the high tap and `lm_head` and its norm as the
target's; the vocabulary is the target's own; flags of the 2026 revision.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from unisparse_jax import models
from unisparse_jax.models import attention_layer, layers, rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleHeadConfig:
  """Architecture of a draft head.

  Attributes:
    target: architecture of the decoder that it drafts for; widths, heads and
      RoPE are taken over.
    tap_layers: layers whose input is read, low to high; num_layers reads the
      last one's output.
    mlp_dim: width of the gated MLP; 0 takes the target's.
    norm_before_fusion: RMSNorm on each tap before `fuse` (EAGLE-3.1).
    feed_back_normed: later draft steps read norm(a) rather than a (EAGLE-3.1).
    share_output: `lm_head` stays the target's; only its norm is trained.
  """

  target: models.DecoderConfig
  tap_layers: tuple[int, ...]
  mlp_dim: int = 0
  norm_before_fusion: bool = False
  feed_back_normed: bool = False
  share_output: bool = False

  def __post_init__(self):
    checks.require(
      isinstance(self.tap_layers, tuple) and len(self.tap_layers) > 0,
      "tap_layers",
      "be a non-empty tuple",
      self.tap_layers,
    )
    for layer in self.tap_layers:
      checks.require(
        isinstance(layer, int) and 0 <= layer <= self.target.num_layers,
        "tap_layers",
        "be layers of the target",
        layer,
        f"0 to {self.target.num_layers}",
      )
    checks.check_non_negative_int("mlp_dim", self.mlp_dim)

  @property
  def taps_dim(self) -> int:
    """Channels of the taps side by side."""
    return len(self.tap_layers) * self.target.embed_dim

  def is_shared(self, name: str) -> bool:
    """Whether this part of a head is the target's and stays so."""
    return name == "embed" or (name == "lm_head" and self.share_output)


class EagleHead(nnx.Module):
  """See the module's docstring.

  Attributes:
    config: the architecture.
    dtype: of the activations; norms, RoPE and logits are float32 inside.
  """

  def __init__(
    self,
    config: EagleHeadConfig,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
  ):
    """Makes a head with random weights; `from_target` makes a better start."""
    types = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    target = config.target
    dim, head_dim = target.embed_dim, target.head_dim
    norm = dict(eps=target.norm_eps, param_dtype=param_dtype)
    q_dim, kv_dim = target.num_heads * head_dim, target.num_kv_heads * head_dim
    self.config = config
    self.dtype = jnp.dtype(dtype)
    self.embed = layers.Embed(target.vocab_size, dim, **types)
    self.fuse = layers.linear(config.taps_dim, dim, **types)
    if config.norm_before_fusion:
      self.tap_norms = nnx.List(
        [layers.RMSNorm(dim, **norm) for _ in config.tap_layers]
      )
    self.embed_norm = layers.RMSNorm(dim, **norm)
    self.feature_norm = layers.RMSNorm(dim, **norm)
    self.q_proj = layers.linear(2 * dim, q_dim, **types)
    self.k_proj = layers.linear(2 * dim, kv_dim, **types)
    self.v_proj = layers.linear(2 * dim, kv_dim, **types)
    self.o_proj = layers.linear(q_dim, dim, **types)
    self.mlp_norm = layers.RMSNorm(dim, **norm)
    self.mlp = layers.GatedMLP(dim, config.mlp_dim or target.mlp_dim, **types)
    self.norm = layers.RMSNorm(dim, **norm)
    self.lm_head = layers.Embed(target.vocab_size, dim, **types)

  @classmethod
  def from_target(
    cls,
    target: models.Decoder,
    *,
    config: EagleHeadConfig | None = None,
    rngs: nnx.Rngs,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
  ) -> "EagleHead":
    """A head that starts from what the target knows.

    Embedding, final norm and output layer are copied; `fuse` passes the high
    tap on.

    Args:
      target: the decoder to draft for.
      config: default: the target's, with `models.tap_layers`.
      rngs: source of the other weights.
      dtype: of the activations; default the target's.
      param_dtype: of the weights.
    """
    if config is None:
      config = EagleHeadConfig(
        target=target.config,
        tap_layers=models.tap_layers(target.config.num_layers),
      )
    checks.require(
      config.target == target.config,
      "config",
      "be made for this target",
      config.target,
      str(target.config),
    )
    head = cls(
      config,
      rngs=rngs,
      dtype=target.dtype if dtype is None else dtype,
      param_dtype=param_dtype,
    )
    embedding = target.embed.embedding[...].astype(param_dtype)
    head.embed.embedding[...] = embedding
    output = target.embed if target.config.tie_embeddings else target.lm_head
    head.lm_head.embedding[...] = output.embedding[...].astype(param_dtype)
    head.norm.scale[...] = target.norm.scale[...].astype(param_dtype)
    dim, num_taps = target.config.embed_dim, len(config.tap_layers)
    # Zeros for the other taps learn all the same: their inputs are not zero.
    rest = jnp.zeros(((num_taps - 1) * dim, dim), param_dtype)
    kernel = jnp.concatenate([rest, jnp.eye(dim, dtype=param_dtype)])
    head.fuse.kernel[...] = kernel
    return head

  @property
  def num_params(self) -> int:
    """Number of weights, the frozen embedding included."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(self, nnx.Param)))

  def fused(
    self, taps: Float[Array, "... taps_dim"]
  ) -> Float[Array, "... embed_dim"]:
    """Features of the target's taps."""
    taps = taps.astype(self.dtype)
    if self.config.norm_before_fusion:
      parts = jnp.split(taps, len(self.config.tap_layers), axis=-1)
      normed = [
        norm(part) for norm, part in zip(self.tap_norms, parts, strict=True)
      ]
      taps = jnp.concatenate(normed, axis=-1)
    return self.fuse(taps)

  def feedback(
    self, out: Float[Array, "... embed_dim"]
  ) -> Float[Array, "... embed_dim"]:
    """What a slot's output is to the slot that follows it."""
    return self.norm(out) if self.config.feed_back_normed else out

  def logits(
    self, out: Float[Array, "... embed_dim"]
  ) -> Float[Array, "... vocab_size"]:
    """float32 scores of the token after next."""
    return self.lm_head.attend(self.norm(out))

  def project(
    self,
    tokens: Int[Array, "batch q_len"],
    features: Float[Array, "batch q_len embed_dim"],
    positions: Int[Array, "batch q_len"],
  ) -> tuple[Array, Array, Array]:
    """q, k and v of a block of slots, RoPE applied.

    Args:
      tokens: the token after each slot's position.
      features: `fused` taps, or `feedback` of the slot before.
      positions: of the features.

    Returns:
      [batch, q_len, num_heads, head_dim] and twice [batch, q_len,
      num_kv_heads, head_dim].
    """
    target = self.config.target
    # [batch, q_len, 2 * embed_dim]
    both = jnp.concatenate(
      [
        self.embed_norm(self.embed(tokens)),
        self.feature_norm(features.astype(self.dtype)),
      ],
      axis=-1,
    )
    cos, sin = rope.cos_sin(positions, target)
    return attention_layer.project_heads(
      both,
      (self.q_proj, self.k_proj, self.v_proj),
      cos,
      sin,
      norms=None,
      config=target,
    )

  def finish(
    self,
    features: Float[Array, "batch q_len embed_dim"],
    attended: Float[Array, "batch q_len num_heads head_dim"],
  ) -> Float[Array, "batch q_len embed_dim"]:
    """The layer's output from its attention."""
    batch, q_len = features.shape[:2]
    out = features.astype(self.dtype) + self.o_proj(
      attended.reshape(batch, q_len, -1)
    )
    return out + self.mlp(self.mlp_norm(out))
