# SPDX-License-Identifier: Apache-2.0
"""Which prefill workers fit a decode worker: those that speculate as it does, since the KV blocks of a draft travel, too."""

import functools
import logging
from collections.abc import Iterable

from tandem_protocol.workers import WorkerRecord

log = logging.getLogger(__name__)


def unpaired(prefill: Iterable[WorkerRecord], decode: WorkerRecord) -> frozenset[str]:
    """Ids of the prefill workers that don't fit."""
    return frozenset(worker.id for worker in prefill if worker.speculation != decode.speculation)


def why_alone(prefill: Iterable[WorkerRecord], decode: WorkerRecord) -> str:
    """The sentence about a decode worker that none of these fits; empty if one does, or there are none."""
    others = {worker.speculation for worker in prefill}
    if not others or decode.speculation in others:
        return ""
    listed = " and ".join(sorted(other or "none" for other in others))
    sentence = (f"no prefill worker speculates as decode worker {decode.id} does ({decode.speculation or 'none'}; theirs: {listed}): "
                "start both roles with the same --speculative-config")
    _tell(sentence)
    return sentence


@functools.lru_cache(maxsize=256)
def _tell(sentence: str) -> None:
    """Once for each pair."""
    log.warning("prefill.unpaired %s", sentence)
