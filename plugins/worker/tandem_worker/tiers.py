# SPDX-License-Identifier: Apache-2.0
"""Asks the KV tiers of the engine's own process. They are the plugin kvbm's, which is known here by the name of one method only."""

import asyncio
from typing import Any

from tandem_protocol.errors import RequestError, UnavailableError

METHOD = "tandem_kvbm"
"""What the plugin adds to vLLM's EngineCore (tandem_kvbm.control)."""
_TIMEOUT_S = 60.0
"""Between two steps a status takes a millisecond; emptying a disk takes what it takes."""


async def ask_tiers(engine: Any, command: str, tier: str, timeout_s: float = _TIMEOUT_S) -> dict[str, Any]:
    """`status`, or `reset` of a tier. Raises RequestError if there is no such tier, UnavailableError if the engine doesn't answer."""
    if not _has_tiers(engine.vllm_config.kv_transfer_config):
        raise RequestError("this worker has no KV tiers: serve it with --connector kvbm")
    try:
        async with asyncio.timeout(timeout_s):
            return dict(await engine.engine_core.call_utility_async(METHOD, command, tier))
    except TimeoutError as exc:
        raise UnavailableError(f"the engine did not answer within {timeout_s:g} s: it is in a long step, or stuck") from exc
    except Exception as exc:  # vLLM raises a bare Exception with the text of the engine's own error
        if engine.errored:
            raise UnavailableError("the engine of this worker died: restart it") from exc
        raise RequestError(f"the engine refused: {exc}") from exc


def _has_tiers(config: Any) -> bool:
    """Whether one of the engine's connectors is ours."""
    if config is None:
        return False
    extras = [config.kv_connector_extra_config]
    extras += [child.get("kv_connector_extra_config", {}) for child in extras[0].get("connectors", ())]
    return any(extra.get("spec_name") == "KvbmSpec" for extra in extras)
