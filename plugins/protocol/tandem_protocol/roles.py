# SPDX-License-Identifier: Apache-2.0
"""The roles a worker can have."""

from enum import StrEnum


class Role(StrEnum):
    """What a worker does with a request."""

    AGGREGATED = "aggregated"
    """Prefill and decode in one engine."""
    PREFILL = "prefill"
    """Computes the KV blocks of a prompt and hands them off; generates no text."""
    DECODE = "decode"
    """Pulls the KV blocks of a prompt and generates; without a handoff it serves like an aggregated worker."""
    ENCODE = "encode"
    """Computes the embeddings of a prompt's images and leaves them for the others; has no KV blocks and generates no text."""
    OMNI = "omni"
    """Runs a pipeline of several engines of vllm-omni, behind one model: text, images and sound. Routers don't place its requests."""

    @property
    def is_disaggregated(self) -> bool:
        """Whether the role takes part in a handoff, so that it needs a connector that moves KV between engines."""
        return self in (Role.PREFILL, Role.DECODE)
