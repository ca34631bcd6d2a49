# SPDX-License-Identifier: Apache-2.0
"""Settings of embeddings that encode workers hand to other engines."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_protocol.settings import parse_float, resolve, setting

EMBEDDING_FOLDER = "TANDEM_EMBEDDING_FOLDER"


def _folder(text: str) -> str:
    if text and not Path(text).is_absolute():
        raise ValueError("expected an absolute path")
    return text


@dataclass(frozen=True)
class EmbeddingSettings:
    """Resolved from the environment alone: encode workers and their consumers must agree."""

    embedding_folder: str = setting(
        env=EMBEDDING_FOLDER, default="", parse=_folder, flag=False,
        help="Folder in which encode workers leave embeddings of images, seen by the engines that use them. Empty: none are handed over. "
             "`tandem serve --encode` sets one of its run.",
    )
    embedding_max_gb: float = setting(
        env="TANDEM_EMBEDDING_MAX_GB", default=4.0, parse=parse_float(0.000001, 100_000), unit="GB", flag=False,
        help="The most that the folder holds; the least recently used go first. A 1000-token image of a 7B model is 7 MB.",
    )
    embedding_ttl_s: float = setting(
        env="TANDEM_EMBEDDING_TTL_S", default=600.0, parse=parse_float(1, 604_800), unit="s", flag=False,
        help="How long an embedding is kept after its last use: the same image may come again.",
    )

    @property
    def max_bytes(self) -> int:
        """The folder's bound."""
        return int(self.embedding_max_gb * 1e9)


def load_settings(environ: Mapping[str, str] | None = None) -> EmbeddingSettings:
    """From the environment. Raises ConfigError."""
    return resolve(EmbeddingSettings, {}, os.environ if environ is None else environ)


def embedding_transfer(settings: EmbeddingSettings, role: Role) -> dict[str, Any] | None:
    """vLLM's ECTransferConfig as a dict; None where embeddings are neither made for others nor taken. Raises ConfigError."""
    if not settings.embedding_folder:
        if role is Role.ENCODE:
            raise ConfigError("an encode worker needs a folder for its embeddings that their users see: set TANDEM_EMBEDDING_FOLDER")
        return None
    return {
        "ec_connector": "EmbeddingConnector",
        "ec_connector_module_path": "tandem_worker.encode.connector",
        "ec_role": "ec_producer" if role is Role.ENCODE else "ec_consumer",
        "ec_connector_extra_config": {
            "folder": settings.embedding_folder, "max_bytes": settings.max_bytes, "ttl_s": settings.embedding_ttl_s,
        },
    }
