# SPDX-License-Identifier: Apache-2.0
"""What a full tier gives up, and what is worth writing to a slow one. Pure."""
