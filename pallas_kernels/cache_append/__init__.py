# SPDX-License-Identifier: Apache-2.0
"""New keys and values of every layer into the cache, at each row's place."""

from pallas_kernels.cache_append.api import cache_append as cache_append
