# SPDX-License-Identifier: Apache-2.0
"""From model.json to the arguments of a pipeline, checked before minutes of loading. Reads the deploy configuration, nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tandem_protocol.errors import ConfigError
from tandem_worker.omni.deployment import DeployedStage, parse_deployment

_RENAMED = ("stage_configs_path", "stage_configs")
_OURS = frozenset({"kv_transfer_config", "kv_events_config", "ec_transfer_config"})


@dataclass(frozen=True)
class OmniArguments:
    """What AsyncOmni is started with."""

    model: str
    deploy_config: str | None = None
    """A file; None: the one that vllm-omni ships for the model."""
    deployed: tuple[DeployedStage, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    """All else that stands in model.json, for AsyncOmni and its stages."""


def complete(given: Mapping[str, Any], model: str, folder: Path) -> OmniArguments:
    """`model` wins over model.json's; a relative `deploy_config` is one of `folder`. Raises ConfigError."""
    arguments = dict(given)
    named = model or arguments.get("model")
    arguments.pop("model", None)
    if not isinstance(named, str) or not named:
        raise ConfigError("no model given: set `model` in model.json, or TANDEM_MODEL")
    for name in _RENAMED:
        if name in arguments:
            raise ConfigError(f"{name} is vllm-omni's before 0.20: write a deploy configuration and name it in `deploy_config`")
    for name in sorted(_OURS & arguments.keys()):
        raise ConfigError(f"{name} does not fit a pipeline, whose stages hand things on by their own connectors: leave it out")
    arguments.setdefault("log_stats", True)  # without it there are no metrics
    path = arguments.pop("deploy_config", None)
    if path is None:
        return OmniArguments(named, engine=arguments)
    file, deployed = _deployment(path, folder)
    return OmniArguments(named, str(file), deployed, arguments)


def _deployment(given: Any, folder: Path) -> tuple[Path, tuple[DeployedStage, ...]]:
    if not isinstance(given, str):
        raise ConfigError(f"deploy_config must be the path of a YAML file, and is {given!r}")
    file = folder / given
    try:
        config = yaml.safe_load(file.read_text())
    except OSError as exc:
        raise ConfigError(f"the deploy configuration can't be read: {exc}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the deploy configuration {file} is not YAML: {exc}") from exc
    return file, parse_deployment(config)
