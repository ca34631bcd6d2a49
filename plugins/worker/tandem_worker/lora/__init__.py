# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of a running engine: fetched, checked, copied, loaded, listed, unloaded."""
