# SPDX-License-Identifier: Apache-2.0
"""Asking the engine's process about its KV tiers."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_kvbm import control
from tandem_protocol.errors import RequestError, UnavailableError
from tandem_worker.tiers import METHOD, ask_tiers

KVBM = {"spec_name": "KvbmSpec", "spec_module_path": "tandem_kvbm.spec"}


class FakeEngine:
    """An AsyncLLM as far as tiers need it."""

    def __init__(self, extra: dict[str, Any] | None, answer: Any = None, *, errored: bool = False) -> None:
        config = None if extra is None else SimpleNamespace(kv_connector_extra_config=extra)
        self.vllm_config = SimpleNamespace(kv_transfer_config=config)
        self.engine_core = self
        self.errored = errored
        self.calls: list[tuple[str, ...]] = []
        self._answer = answer

    async def call_utility_async(self, *call: str) -> Any:
        """Answers, fails, or never does."""
        self.calls.append(call)
        if isinstance(self._answer, Exception):
            raise self._answer
        if self._answer is None:
            await asyncio.Event().wait()
        return self._answer


@pytest.mark.parametrize("extra", [KVBM, {"connectors": [{"kv_connector": "NixlConnector"}, {"kv_connector_extra_config": KVBM}]}])
async def test_the_engine_is_asked_by_the_plugins_method(extra: dict[str, Any]) -> None:
    """Alone or under MultiConnector."""
    engine = FakeEngine(extra, {"tiers": []})
    assert await ask_tiers(engine, "reset", "G2") == {"tiers": []}
    assert engine.calls == [(control.METHOD, "reset", "G2")]
    assert METHOD == control.METHOD


@pytest.mark.parametrize("extra", [None, {}, {"connectors": [{"kv_connector": "NixlConnector"}]}])
async def test_a_worker_without_tiers_says_so(extra: dict[str, Any] | None) -> None:
    """Without asking its engine."""
    engine = FakeEngine(extra, {})
    with pytest.raises(RequestError, match="serve it with --connector kvbm"):
        await ask_tiers(engine, "status", "")
    assert engine.calls == []


async def test_failures_are_told_apart() -> None:
    """A refusal, a dead engine, an engine that doesn't answer."""
    with pytest.raises(RequestError, match="the engine refused: no tier"):
        await ask_tiers(FakeEngine(KVBM, Exception("no tier")), "reset", "G4")
    with pytest.raises(UnavailableError, match="died"):
        await ask_tiers(FakeEngine(KVBM, Exception("dead"), errored=True), "status", "")
    with pytest.raises(UnavailableError, match=r"within 0.01 s"):
        await ask_tiers(FakeEngine(KVBM), "status", "", timeout_s=0.01)
