# SPDX-License-Identifier: Apache-2.0
"""One file a method: a frozen dataclass of settings with `select`."""
