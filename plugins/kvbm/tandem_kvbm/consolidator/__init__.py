# SPDX-License-Identifier: Apache-2.0
"""One stream of KV events out of the engine's own streams (every data-parallel rank) and those of the tiers."""
