# SPDX-License-Identifier: Apache-2.0
"""Holds TTFT and ITL targets by scaling workers: observe, predict, plan, scale."""
