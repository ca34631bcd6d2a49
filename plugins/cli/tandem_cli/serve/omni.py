# SPDX-License-Identifier: Apache-2.0
"""`tandem serve --omni`: one pipeline of vllm-omni as the model `omni`, in an environment of its own (docs/omni.md)."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_cli.serve.engine_arguments import check_known, fields_of
from tandem_cli.serve.fleet import Fleet, WorkerPlan
from tandem_cli.serve.omni_environment import OmniEnvironment, fault_of
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_worker.omni.arguments import complete

MODEL = "omni"
MODEL_FILES = ("config.json", "model_index.json")
"""One of them is in a pipeline's folder: those of diffusers have the other."""
_FLAG = re.compile(r'"--([a-z0-9][a-z0-9-]*)"')
_CLASSES: Mapping[tuple[str, str], frozenset[str]] = {
    ("vllm", "engine/arg_utils.py"): frozenset({"EngineArgs", "AsyncEngineArgs"}),
    ("vllm_omni", "engine/arg_utils.py"): frozenset({"OmniEngineArgs", "OmniAsyncEngineArgs", "OrchestratorArgs"}),
    ("vllm_omni", "diffusion/data.py"): frozenset({"OmniDiffusionConfig"}),
}
"""The classes whose fields AsyncOmni takes as keywords, by package and file."""
_COMMAND = "entrypoints/cli/serve.py"
"""In vllm_omni: flags of its own command, some of which are no field of any class."""


@dataclass(frozen=True)
class OmniOptions:
    """What was asked for besides the model and AsyncOmni's own arguments."""

    environment: str
    """Folder; empty: none is named, and none was made."""
    deploy_config: str | None = None


def plan_pipeline(options: OmniOptions, found: OmniEnvironment, model: str, arguments: Mapping[str, Any], gpus: int) -> Fleet:
    """One worker that sees all GPUs, since the deploy configuration gives each stage its own. Raises ConfigError for what can't serve.

    Reads the deploy configuration and vllm-omni's source, nothing else.
    """
    fault = fault_of(found, gpus)
    if fault is not None:
        raise ConfigError(f"{fault.says}: {fault.fix}")
    check_known(arguments, known_arguments(found.sources))
    own = dict(arguments)
    if options.deploy_config is not None:
        own["deploy_config"] = str(Path(options.deploy_config).absolute())
    complete(own, model, Path.cwd())  # what the worker would refuse after half a minute
    return Fleet((WorkerPlan(MODEL, Role.OMNI, 0, execution_env=found.folder, arguments=own),), ())


def known_arguments(sources: Mapping[str, str]) -> frozenset[str]:
    """What AsyncOmni takes, read off its source: it drops what it doesn't know, with a line in its log."""
    named = (fields_of(ast.parse((Path(sources[package]) / file).read_text()), classes) for (package, file), classes in _CLASSES.items())
    flags = _FLAG.findall((Path(sources["vllm_omni"]) / _COMMAND).read_text())
    return frozenset({"output_modalities", *(flag.replace("-", "_") for flag in flags)}).union(*named)
