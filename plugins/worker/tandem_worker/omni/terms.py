# SPDX-License-Identifier: Apache-2.0
"""What a pipeline's stages are, and what one request asks of each of them.

Pure. A request's sampling parameters are JSON: a bare name is meant for the first stage that has such a parameter, `stages` names the
others, by id or by what the model calls them: `{"temperature": 0, "num_inference_steps": 20, "stages": {"talker": {"seed": 7}}}`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from tandem_protocol.errors import RequestError

STAGES = "stages"
_AT_LEAST_ONE = frozenset({"num_inference_steps", "height", "width", "num_frames", "num_outputs_per_prompt"})


class StageKind(StrEnum):
    """Which sampling parameters a stage takes."""

    LLM = "llm"
    """Tokens one by one: vLLM's SamplingParams."""
    DIFFUSION = "diffusion"
    """Steps of denoising: vllm-omni's OmniDiffusionSamplingParams."""


@dataclass(frozen=True)
class Stage:
    """One engine of a running pipeline."""

    id: int
    kind: StageKind
    name: str = ""
    """As the model calls it, e.g. `thinker`; empty if it doesn't."""
    makes: str | None = None
    """`text`, `image` or `audio` that leaves the pipeline here; None for a stage that only feeds others."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters that a request may set: name -> declared type."""
    takes_images: bool = True
    """As inputs; also where nobody can tell."""

    @property
    def title(self) -> str:
        """For messages."""
        return f"stage {self.id} ({self.name})" if self.name else f"stage {self.id}"


def sampling_by_stage(given: Mapping[str, Any], stages: Sequence[Stage]) -> tuple[dict[str, Any], ...]:
    """What the request sets of each stage's parameters, converted to their types. Raises RequestError with the fix.

    The stages' own defaults hold for all that is not here.
    """
    wanted: dict[int, dict[str, Any]] = {stage.id: {} for stage in stages}
    for name, value in given.items():
        if name != STAGES and value is not None:
            stage = _first_with(name, stages)
            wanted[stage.id][name] = _convert(stage, name, value)
    for key, values in _own(given.get(STAGES)).items():
        stage = _named(str(key), stages)
        for name, value in values.items():
            if name not in stage.parameters:
                raise RequestError(_unknown(name, f"{stage.title} has no sampling parameter {name!r}", stage.parameters))
            if value is not None:
                wanted[stage.id][name] = _convert(stage, name, value)
    return tuple(wanted[stage.id] for stage in stages)


def wanted_modalities(given: Sequence[str], stages: Sequence[Stage]) -> tuple[str, ...]:
    """What the pipeline is to make: all that it can unless the request names some of it. Raises RequestError for anything else."""
    made = tuple(dict.fromkeys(stage.makes for stage in stages if stage.makes is not None))
    for one in given:
        if one not in made:
            raise RequestError(f"this pipeline makes no {one!r}: ask in `modalities` for {', '.join(made)}, or leave it out for all")
    return tuple(one for one in made if one in given) if given else made


def check_images(count: int, stages: Sequence[Stage]) -> None:
    """Raises RequestError for images that the first stage would refuse, or overlook in silence, as diffusion does."""
    if count and not stages[0].takes_images:
        raise RequestError(f"{stages[0].title} of this pipeline, to which images go first, takes none: leave `image` out")


def _own(given: Any) -> Mapping[str, Mapping[str, Any]]:
    """Triton's request parameters know no objects, so there it is JSON text."""
    try:
        parsed = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError as exc:
        raise RequestError(f"`stages` of the sampling parameters is not JSON: {exc}") from exc
    if not isinstance(parsed, Mapping) or not all(isinstance(one, Mapping) for one in parsed.values()):
        raise RequestError('`stages` of the sampling parameters must map stages to parameters, like {"0": {"temperature": 0.7}}')
    return parsed


def _named(key: str, stages: Sequence[Stage]) -> Stage:
    found = [stage for stage in stages if key in (str(stage.id), stage.name)]
    if not found:
        raise RequestError(f"sampling parameters for stage {key!r}, which is not there: this pipeline has "
                           f"{', '.join(stage.title for stage in stages)}")
    if len(found) > 1:
        raise RequestError(f"several stages are called {key!r}: use their ids {', '.join(str(stage.id) for stage in found)}")
    return found[0]


def _first_with(name: str, stages: Sequence[Stage]) -> Stage:
    stage = next((stage for stage in stages if name in stage.parameters), None)
    if stage is None:
        known = dict.fromkeys(known for stage in stages for known in stage.parameters)
        raise RequestError(_unknown(name, f"no stage of this pipeline has a sampling parameter {name!r}", known))
    return stage


def _unknown(name: str, sentence: str, known: Mapping[str, Any]) -> str:
    if name == "n":
        return f"{sentence}: a pipeline answers a request once, so send it several times"
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
    return f"{sentence}: {hint}"


def _convert(stage: Stage, name: str, value: Any) -> Any:
    """Clients send numbers as texts, and integers as floats."""
    try:
        converted = msgspec.convert(value, stage.parameters[name], strict=False)
    except (msgspec.ValidationError, TypeError) as exc:
        raise RequestError(f"sampling parameter {name}={value!r} of {stage.title} is not valid: {exc}") from exc
    if name in _AT_LEAST_ONE and converted is not None and converted < 1:
        raise RequestError(f"sampling parameter {name}={value!r} of {stage.title} is not valid: give at least 1")
    return converted
