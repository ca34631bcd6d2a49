# SPDX-License-Identifier: Apache-2.0
"""Images of requests: where they may come from, how they are fetched and decoded, and within which limits."""
