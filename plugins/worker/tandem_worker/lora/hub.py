# SPDX-License-Identifier: Apache-2.0
"""Files of a Hugging Face repository, in bounded time. Edge module: the worker's only one that speaks to a hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils._headers import build_hf_headers

from tandem_protocol.errors import RequestError, UnavailableError
from tandem_worker.lora.deadline import Deadline
from tandem_worker.lora.intake import Intake

_TIMEOUT_S = 10.0
"""Of a connection and of one read; a whole file has the load's deadline."""
_CHUNK = 1 << 18


class HubFiles:
    """Downloads from the hub of HF_ENDPOINT, with the token of its own variables. Thread-safe."""

    def __init__(self, endpoint: str = "") -> None:
        self._endpoint = endpoint or constants.ENDPOINT

    def fetch(self, repo: str, revision: str, files: dict[str, Path], intake: Intake, deadline: Deadline) -> None:
        """Name -> new file. Raises RequestError for what is missing or forbidden, UnavailableError if no hub can be reached."""
        if constants.HF_HUB_OFFLINE:
            raise UnavailableError("HF_HUB_OFFLINE is set: load the adapter from a folder (file://) or a bucket (s3://)")
        timeout_s = max(0.1, min(_TIMEOUT_S, deadline.left_s()))
        with httpx.Client(headers=build_hf_headers(), timeout=timeout_s, follow_redirects=True) as client:
            for name, target in files.items():
                deadline.check()
                url = hf_hub_url(repo, name, revision=revision, endpoint=self._endpoint)
                with self._answer(client, url, repo, revision) as answer:
                    intake.take_chunks(answer.iter_bytes(_CHUNK), target, deadline)

    @contextmanager
    def _answer(self, client: httpx.Client, url: str, repo: str, revision: str) -> Iterator[Any]:
        try:
            with client.stream("GET", url) as answer:
                _check(answer.status_code, f"hf://{repo}@{revision}", url)
                yield answer
        except httpx.HTTPError as exc:
            raise UnavailableError(f"the hub {self._endpoint} can't be reached ({exc}): load the adapter from a folder (file://) "
                                   "or a bucket (s3://), or set HF_ENDPOINT") from exc


def _check(status: int, repo: str, url: str) -> None:
    if status == 200:
        return
    if status in {401, 403}:
        raise RequestError(f"{repo} was refused with HTTP {status}: it doesn't exist, or HF_TOKEN may not read it")
    if status < 500 and status != 429:
        raise RequestError(f"{repo} has no {url.rsplit('/', 1)[-1]} (HTTP {status}): check name and revision")
    raise UnavailableError(f"the hub answered HTTP {status} for {url}: retry later")
