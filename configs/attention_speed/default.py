# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer, 4K to 1M tokens, beside every peer, on one GPU.

Run:     python -m experiments.attention_speed
           --config=configs/attention_speed/default.py --workdir=out/speed
Device:  one H100 or H200, seven minutes (measured on an H200 with its host
         busy), 80 s of them PyTorch's peers, the rest mostly compilers.
Expect:  on an H200, TFLOP/s on kept blocks from density 1 to 0.05: 616 to 558
         at 32K (tokamax's dense 620, cuDNN's 591, FlexAttention 432 to 341),
         622 to 581 at 128K (628, 579, 413 to 397); gradients 492 to 408 at 32K
         (cuDNN's dense 523, FlexAttention 396 to 321); 1M tokens with their
         selection 566 ms: results/attention_speed_h200.jsonl, the whole of it
         (taken with torch_timeout_s=220, which it did not need).
"""

import ml_collections


def get_config():
  jax_peers = ("cudnn", "attention_mgpu", "tokamax")
  # FlexAttention compiles for some seconds at each density and direction, so
  # it runs at 32K and 128K alone.
  dense = (*jax_peers, "torch_flash2", "torch_cudnn")
  between = dict(densities=(1.0, 0.25, 0.05), peers=dense)
  config = ml_collections.ConfigDict()
  config.cases = (
    dict(length=4096, backward=True, selection=True, peers=dense),
    dict(length=8192, **between),
    dict(length=16384, **between),
    dict(length=32768, backward=True, selection=True),
    dict(length=32768, head_dim=64, backward=True),
    dict(length=65536, **between),
    dict(
      length=131072,
      backward=True,
      selection=True,
      # FlashAttention-2 would take almost twice the time of cuDNN.
      peers=(*jax_peers, "torch_cudnn", "torch_flex"),
    ),
    dict(
      length=1048576,
      densities=(0.03,),
      peers=(),
      selection=True,
      selected_densities=(0.03,),
    ),
  )
  config.selectors = (dict(method="unisparse", top_p=0.9),)
  # At 1M, lists of all 8,192 blocks would take 2 GiB.
  config.attended = dict(method="unisparse", max_blocks=512)
  config.torch_timeout_s = 165
  return config
