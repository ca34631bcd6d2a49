# SPDX-License-Identifier: Apache-2.0
"""Measures what a running server can do, point by point, for the planner."""
