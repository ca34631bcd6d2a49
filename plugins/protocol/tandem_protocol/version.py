# SPDX-License-Identifier: Apache-2.0
"""The one place where Tandem's version stands; pyproject.toml reads it."""

VERSION = "0.1.0"
