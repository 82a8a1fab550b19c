# SPDX-License-Identifier: Apache-2.0
"""Sparse prefill attention, speculative decoding and MCMC in JAX.

Import the sub-packages: `from unisparse_jax import attention, models`.
"""

from unisparse_jax.version import __version__ as __version__
