# SPDX-License-Identifier: Apache-2.0
"""The one error of the benchmarks."""


class BenchmarkError(Exception):
    """A target or a load process failed; the message is the reason that the report prints."""
