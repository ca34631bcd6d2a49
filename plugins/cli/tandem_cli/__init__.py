# SPDX-License-Identifier: Apache-2.0
"""The `tandem` command: serve, stop, generate, chat, status."""
