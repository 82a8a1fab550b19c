# SPDX-License-Identifier: Apache-2.0
"""PyTorch peers of the attention-speed experiment, in a process of their own.

  python -m experiments.kernels.attention_speed_torch < REQUEST > RECORDS

The request is a config of the experiment as JSON, records are JSON lines.
Inputs have the sizes and the block lists of ours; FlexAttention gets the same
lists.
"""

import json
import sys
import warnings

import numpy as np

from experiments.kernels import attention_speed_config as speed_config
from experiments.kernels import attention_speed_run as speed_run


def main():
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    print(json.dumps({"method": "torch", "error": str(error)}), flush=True)
    return
  if not torch.cuda.is_available():
    message = "PyTorch sees no GPU"
    print(json.dumps({"method": "torch", "error": message}), flush=True)
    return
  warnings.simplefilter("ignore")
  config = speed_config.parse(json.load(sys.stdin))
  for case in config.cases:
    for record in _measure_case(torch, config, case):
      record["torch"] = torch.__version__
      print(json.dumps(record), flush=True)


def _measure_case(torch, config, case):
  from torch.nn import attention  # pyright: ignore[reportMissingImports]

  dtype = getattr(torch, config.dtype)
  generator = torch.Generator("cuda").manual_seed(config.seed)

  def draw(heads):
    return torch.randn(
      (1, heads, case.length, case.head_dim),
      device="cuda",
      dtype=dtype,
      generator=generator,
    ).requires_grad_(case.backward)

  q, k, v = (draw(h) for h in (config.num_heads, *[config.num_kv_heads] * 2))
  d_out = torch.randn_like(q)
  size = {"length": case.length, "head_dim": case.head_dim}
  directions = ("forward", "backward") if case.backward else ("forward",)
  backends = {
    "torch_flash2": attention.SDPBackend.FLASH_ATTENTION,
    "torch_cudnn": attention.SDPBackend.CUDNN_ATTENTION,
  }
  pairs = speed_run.causal_pairs(case.length, config.num_heads)
  for name, backend in backends.items():
    if name not in case.peers:
      continue

    def attend_dense(backend=backend):
      with attention.sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
          q, k, v, is_causal=True, enable_gqa=True
        )

    for direction in directions:
      yield {
        **size,
        "method": name,
        "density": 1.0,
        "direction": direction,
        **_time(
          torch, config, attend_dense, (q, k, v), d_out, direction, pairs
        ),
      }
  if "torch_flex" not in case.peers:
    return
  for density in case.densities:
    mask, pairs = _flex_mask(torch, config, case, density)
    attend = _flex_attention(torch, q, k, v, mask)
    for direction in directions:
      yield {
        **size,
        "method": "torch_flex",
        "density": density,
        "direction": direction,
        **_time(torch, config, attend, (q, k, v), d_out, direction, pairs),
      }


def _flex_module():
  from torch.nn.attention import (  # pyright: ignore[reportMissingImports]
    flex_attention,
  )

  return flex_attention


def _flex_mask(torch, config, case, density):
  """The block mask of ours: the diagonal block is partial, the rest full."""
  flex_attention = _flex_module()
  lists, counts = speed_run.random_lists(
    case.length,
    density,
    block=config.block,
    num_mask_heads=config.num_mask_heads,
    seed=config.seed,
  )
  per_mask = config.num_heads // config.num_mask_heads
  pairs = float(counts.sum()) * per_mask * config.block**2
  blocks = case.length // config.block

  def widen(array, room):
    """All heads, and as much room in a list as there are blocks."""
    array = np.repeat(array, per_mask, axis=1)
    pad = [(0, 0)] * (array.ndim - 1) + [(0, room - array.shape[-1])]
    return torch.as_tensor(np.pad(array, pad)).cuda()

  def is_visible(batch, head, query, key):
    return query >= key

  mask = flex_attention.BlockMask.from_kv_blocks(
    torch.ones_like(widen(counts, blocks)),
    widen(lists[..., :1], blocks),
    widen(counts - 1, blocks),
    widen(lists[..., 1:], blocks),
    BLOCK_SIZE=config.block,
    mask_mod=is_visible,
  )
  return mask, pairs


def _flex_attention(torch, q, k, v, mask):
  flex_attention = _flex_module()
  compiled = torch.compile(flex_attention.flex_attention, dynamic=False)
  return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def _time(torch, config, attend, inputs, d_out, direction, pairs):
  try:
    if direction == "backward":
      out = attend()

      def call():
        return torch.autograd.grad(out, inputs, d_out, retain_graph=True)
    else:

      def call():
        with torch.no_grad():
          return attend()

    record = speed_run.clock(
      call,
      lambda _: torch.cuda.synchronize(),
      repeats=config.repeats,
      group_ms=config.group_ms,
    )
    work = speed_run.flops(
      pairs, d_out.shape[-1], backward=direction == "backward"
    )
    return {**record, "tflops": work / record["median_ms"] / 1e9}
  except Exception as error:  # a peer's refusal is a result
    return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


if __name__ == "__main__":
  main()
