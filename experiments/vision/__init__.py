# SPDX-License-Identifier: Apache-2.0
"""Parts of the experiment on bidirectional and cross attention."""
