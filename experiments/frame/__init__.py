# SPDX-License-Identifier: Apache-2.0
"""What every experiment starts and ends with."""
