# SPDX-License-Identifier: Apache-2.0
"""Whether a handoff fits this decode worker: prefill and decode must speculate alike.

A draft model's KV blocks travel with the target's. Without them vLLM would decode with guesses made of nothing, or fail the pull; so the
handoff is given back, and the prompt computed here. Routers pair like with like (`tandem_router.pairing`); this is for ensembles, and for
clients that chain the two legs by themselves.
"""

import functools
import logging
from typing import Any

from prometheus_client import Counter

from tandem_protocol import handoff

log = logging.getLogger(__name__)

UNPAIRED = Counter("tandem_worker_unpaired_handoffs",
                   "Handoffs given back because their prefill worker speculates otherwise, so that this worker computed the prompt")


def is_paired(received: dict[str, Any], own: str) -> bool:
    """Whether the handoff's prefill worker speculates as this worker does; if not, it is counted."""
    theirs = handoff.speculation_of(received)
    if theirs == own:
        return True
    UNPAIRED.inc()
    _tell(theirs, own)
    return False


@functools.lru_cache(maxsize=64)
def _tell(theirs: str, own: str) -> None:
    """Once for each two."""
    log.warning("handoff.unpaired prefill=%s decode=%s: start both with the same --speculative-config; until then decode computes prompts",
                theirs or "none", own or "none")
