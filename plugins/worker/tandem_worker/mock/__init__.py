# SPDX-License-Identifier: Apache-2.0
"""A mock vLLM worker: it schedules, caches and publishes like one, and computes nothing."""
