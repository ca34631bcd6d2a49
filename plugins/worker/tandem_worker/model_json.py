# SPDX-License-Identifier: Apache-2.0
"""What a model's folder says of its engine."""

import json
from pathlib import Path
from typing import Any

from tandem_protocol.errors import ConfigError


def read_model_json(folder: Path) -> dict[str, Any]:
    """The arguments in `model.json`; none if there is no such file. Raises ConfigError."""
    path = folder / "model.json"
    if not path.exists():
        return {}
    try:
        given = json.loads(path.read_text())
    except ValueError as exc:
        raise ConfigError(f"{path.name} is not JSON: {exc}") from exc
    if not isinstance(given, dict):
        raise ConfigError(f"{path.name} must be a JSON object of the engine's arguments")
    return given
