# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of a decoder layer out of one projection."""

from pallas_kernels.head_rotation.api import head_rotation as head_rotation
