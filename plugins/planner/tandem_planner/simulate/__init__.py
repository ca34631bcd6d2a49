# SPDX-License-Identifier: Apache-2.0
"""A fleet in virtual time: requests, workers that take as long as a profile says, and a planner that scales them."""
