# SPDX-License-Identifier: Apache-2.0
"""KV-aware routing: an index of who holds which KV block, the cost of each choice, and the dispatch of requests."""
