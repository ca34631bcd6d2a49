# SPDX-License-Identifier: Apache-2.0
"""Checks vllm-omni's deploy configuration (`deploy_config`, a YAML) before minutes of loading: pure, a mapping in, stages out.

The configuration says which stage of a pipeline runs on which devices with which defaults. What the stages are and how they follow one
another is vllm-omni's own, by the model, but for `edges`. Written for vllm-omni 0.30, which refuses the `stage_args` of earlier ones.
"""

import difflib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from tandem_protocol.errors import ConfigError
from tandem_worker.omni.terms import Stage

_KNOWN = frozenset({
    "base_config", "stages", "async_chunk", "connectors", "pipeline", "trust_remote_code", "platforms", "enable_prefix_caching",
    "distributed_executor_backend", "dtype", "session_mode", "enable_chunked_prefill", "duplex_session", "edges", "model_runner",
    "active_stream_window", "forced_aligner", "quantization", "data_parallel_size", "pipeline_parallel_size", "custom_voice_dir",
})
_ELSEWHERE = frozenset({"base_config", "pipeline", "forced_aligner"})
"""Keys that bring stages of their own."""
_RUNNERS = ("v1", "v2")
_ROUNDING = 1e-6


@dataclass(frozen=True)
class DeployedStage:
    """One engine of a pipeline."""

    id: int
    devices: tuple[int, ...] = ()
    """Empty: vllm-omni chooses."""
    memory_share: float | None = None
    """Of each of its devices."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Defaults, which a request overrides."""
    settings: frozenset[str] = frozenset()
    """Names of all that is set of it."""


def parse_deployment(config: Any) -> tuple[DeployedStage, ...]:
    """The stages of a deploy configuration, in the order of their ids. Raises ConfigError with a sentence per mistake.

    One with `base_config` is judged by what it overrides: the base is vllm-omni's to find.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("the stage configuration must be a YAML mapping with the key `stages`")
    _check_keys(config)
    given = config.get("stages") or []
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigError("`stages` of the stage configuration must be a list of mappings with a stage_id each")
    if not given and not _ELSEWHERE & config.keys():
        raise ConfigError("the stage configuration has no stages: list them under `stages`, or name a base_config or pipeline")
    stages = tuple(sorted((_stage(one) for one in given), key=lambda stage: stage.id))
    ids = [stage.id for stage in stages]
    for stage_id in ids:
        if ids.count(stage_id) > 1:
            raise ConfigError(f"stage_id {stage_id} is given twice: number the stages 0, 1, ...")
    _check_memory(stages)
    _check_edges(config.get("edges") or [], ids)
    return stages


def check_settings(deployed: Iterable[DeployedStage], known: Collection[str]) -> None:
    """Raises ConfigError for a setting that no engine knows: vllm-omni drops it with a line in the log."""
    for stage in deployed:
        for name in sorted(stage.settings - set(known)):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "leave it out"
            raise ConfigError(f"stage {stage.id} of the stage configuration has an unknown setting {name!r}: {hint}")


def check_pipeline(stages: Sequence[Stage], deployed: Iterable[DeployedStage]) -> None:
    """A pipeline that was started against what was wanted of it. Raises ConfigError. vllm-omni overlooks settings of other stages."""
    if not any(stage.makes for stage in stages):
        raise ConfigError("the pipeline makes nothing that this model has an output for: use one that makes text, images or sound")
    for one in deployed:
        if one.id >= len(stages):
            listed = ", ".join(stage.title for stage in stages)
            raise ConfigError(f"the stage configuration has settings for stage {one.id}, which is not there: the pipeline has {listed}")


def _check_keys(config: Mapping[str, Any]) -> None:
    if "stage_args" in config:
        raise ConfigError("`stage_args` is the stage configuration of vllm-omni before 0.20: write deployment settings under `stages`, "
                          "with a stage_id each; what follows what is the model's own")
    for name in config:
        if name not in _KNOWN:
            close = difflib.get_close_matches(str(name), _KNOWN, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(_KNOWN))}"
            raise ConfigError(f"unknown key {name!r} in the stage configuration: {hint}")
    if config.get("model_runner", "v1") not in _RUNNERS:
        raise ConfigError(f"model_runner {config['model_runner']!r} does not exist: use {' or '.join(_RUNNERS)}")


def _stage(given: Any) -> DeployedStage:
    if not isinstance(given, Mapping) or "stage_id" not in given:
        raise ConfigError(f"a stage is a mapping with a stage_id, and one is {given!r}")
    stage_id = given["stage_id"]
    if not isinstance(stage_id, int) or isinstance(stage_id, bool) or stage_id < 0:
        raise ConfigError(f"stage_id {stage_id!r} does not work: number the stages 0, 1, ...")
    sampling = given.get("default_sampling_params") or {}
    if not isinstance(sampling, Mapping):
        raise ConfigError(f"default_sampling_params of stage {stage_id} must be a mapping")
    share = _share(stage_id, given.get("gpu_memory_utilization"))
    return DeployedStage(stage_id, _devices(stage_id, given.get("devices")), share, dict(sampling), frozenset(map(str, given)))


def _devices(stage_id: int, given: Any) -> tuple[int, ...]:
    if given is None:
        return ()
    texts = [text.strip() for text in str(given).split(",")]
    if not all(text.isdecimal() for text in texts):
        raise ConfigError(f"devices {given!r} of stage {stage_id} does not work: give numbers of GPUs, like \"0\" or \"0,1\"")
    devices = tuple(map(int, texts))
    if len(set(devices)) < len(devices):
        raise ConfigError(f"devices {given!r} of stage {stage_id} names a GPU twice")
    return devices


def _share(stage_id: int, given: Any) -> float | None:
    if given is None:
        return None
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 < given <= 1:
        raise ConfigError(f"gpu_memory_utilization {given!r} of stage {stage_id} does not work: use a share above 0, up to 1")
    return float(given)


def _check_memory(stages: Iterable[DeployedStage]) -> None:
    """Stages that share a GPU share its memory; vLLM sees that only when the last of them has loaded the others' minutes away."""
    shares: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for stage in stages:
        for device in stage.devices:
            if stage.memory_share is not None:
                shares[device][stage.id] = stage.memory_share
    for device, by_stage in shares.items():
        if sum(by_stage.values()) > 1 + _ROUNDING:
            listed = ", ".join(f"stage {stage_id} {share:g}" for stage_id, share in by_stage.items())
            raise ConfigError(f"the stages on GPU {device} want more than its memory ({listed}): lower their gpu_memory_utilization")


def _check_edges(edges: Any, ids: Sequence[int]) -> None:
    """Edges lead from stage to stage, and never back."""
    before: dict[int, set[int]] = {stage_id: set() for stage_id in ids}
    for edge in edges:
        if not isinstance(edge, Mapping) or "from" not in edge or "to" not in edge:
            raise ConfigError(f"an edge is a mapping with from and to, and one is {edge!r}")
        for end in ("from", "to"):
            if edge[end] not in before:
                raise ConfigError(f"an edge leads {end} stage {edge[end]!r}, which is not there: stages are {', '.join(map(str, ids))}")
        before[edge["to"]].add(edge["from"])
    try:
        TopologicalSorter(before).prepare()
    except CycleError as exc:
        raise ConfigError(f"the edges lead in a circle: {' -> '.join(map(str, exc.args[1]))}") from exc
