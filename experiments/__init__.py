# SPDX-License-Identifier: Apache-2.0
"""Programs that measure: `python -m experiments.NAME --config --workdir`.

The files here are the programs. What they are made of lies in a folder by
field, and in `frame` what all of them begin and end with.
"""
