# SPDX-License-Identifier: Apache-2.0
"""Hypothesis draws the same examples in every run: a red test stays red until it is mended."""

from hypothesis import settings

settings.register_profile("tandem", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("tandem")
