# SPDX-License-Identifier: Apache-2.0
"""Python imports this by itself in every process that has this folder in PYTHONPATH: engines, guards, consolidators."""

from spoils import install

install()
