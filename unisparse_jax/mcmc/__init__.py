# SPDX-License-Identifier: Apache-2.0
"""Markov chain Monte Carlo with control variates, on thousands of chains."""
