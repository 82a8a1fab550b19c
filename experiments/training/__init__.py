# SPDX-License-Identifier: Apache-2.0
"""Parts of the experiments that train a decoder or a draft head."""
