# SPDX-License-Identifier: Apache-2.0
"""Logged trees that never were: random ones, and ones with a known rule."""

import numpy as np

from unisparse_jax.speculative import calibration


def random_records(n=60, max_nodes=12, max_depth=4, seed=0):
  """Random trees by score and random accepted paths in them."""
  rng = np.random.default_rng(seed)
  depths = np.full((n, max_nodes + 1), -1, np.int8)
  parents = np.zeros((n, max_nodes + 1), np.int64)
  path = np.full((n, max_depth + 1), -1, np.int16)
  path[:, 0] = 0
  for i in range(n):
    size = int(rng.integers(1, max_nodes + 1))
    depths[i, 0] = 0
    for node in range(1, size + 1):
      above = [p for p in range(node) if 0 <= depths[i, p] < max_depth]
      parents[i, node] = rng.choice(above)
      depths[i, node] = depths[i, parents[i, node]] + 1
    node = int(rng.integers(0, size + 1))
    while node:
      path[i, depths[i, node]] = node
      node = int(parents[i, node])
  return make(
    depths, path, entropy=rng.gamma(2.0, 2.0, n).astype(np.float32)
  ), parents


def chains(entropy, accepted, max_depth, requests=None):
  """One chain a step: node d is the token of depth d."""
  n = len(entropy)
  depths = np.tile(np.arange(max_depth + 1, dtype=np.int8), (n, 1))
  levels = np.arange(max_depth + 1)
  path = np.where(
    levels[None, :] <= np.asarray(accepted)[:, None], levels[None, :], -1
  ).astype(np.int16)
  return make(
    depths, path, entropy=np.asarray(entropy, np.float32), requests=requests
  )


def make(depths, path, *, entropy, requests=None):
  n = len(entropy)
  if requests is None:
    requests = np.arange(n) // 10
  requests = np.asarray(requests, np.int32)
  order = np.zeros(n, np.int32)
  for request in np.unique(requests):
    mine = requests == request
    order[mine] = np.arange(mine.sum())
  return calibration.StepRecords(
    entropy=entropy,
    score=-entropy,
    depths=depths,
    path=path,
    request=requests,
    order=order,
    group=np.zeros(n, np.int32),
  )
