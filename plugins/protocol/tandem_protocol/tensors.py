# SPDX-License-Identifier: Apache-2.0
"""The tensor contract of every generating model.

It is the contract of Triton's vllm_backend, byte for byte, with three optional additions (`input_ids`, `output_ids`,
`num_cached_tokens`) and the handoff (`kv_transfer_params`). Workers declare it to Triton from here, and the ensemble,
the clients and the tests read it from here, so that it can't drift.
"""

from dataclasses import dataclass

from tandem_protocol.roles import Role


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, Triton data type and dims (-1 is any length)."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = True


TEXT_INPUT = "text_input"
INPUT_IDS = "input_ids"
IMAGE = "image"
STREAM = "stream"
SAMPLING_PARAMETERS = "sampling_parameters"
EXCLUDE_INPUT_IN_OUTPUT = "exclude_input_in_output"
KV_TRANSFER_PARAMS = "kv_transfer_params"
EC_TRANSFER_PARAMS = "ec_transfer_params"

MODALITIES = "modalities"
NEGATIVE_PROMPT = "negative_prompt"

TEXT_OUTPUT = "text_output"
IMAGE_OUTPUT = "image_output"
AUDIO_OUTPUT = "audio_output"
MODALITY = "modality"
OUTPUT_IDS = "output_ids"
FINISH_REASON = "finish_reason"
CUMULATIVE_LOGPROB = "cumulative_logprob"
LOGPROBS = "logprobs"
NUM_INPUT_TOKENS = "num_input_tokens"
NUM_OUTPUT_TOKENS = "num_output_tokens"
NUM_CACHED_TOKENS = "num_cached_tokens"

OPTIONAL_OUTPUTS = (
    TensorSpec(FINISH_REASON, "TYPE_STRING", (-1,)),
    TensorSpec(CUMULATIVE_LOGPROB, "TYPE_FP32", (-1,)),
    TensorSpec(LOGPROBS, "TYPE_STRING", (-1,)),
    TensorSpec(NUM_INPUT_TOKENS, "TYPE_UINT32", (1,)),
    TensorSpec(NUM_OUTPUT_TOKENS, "TYPE_UINT32", (-1,)),
    TensorSpec(OUTPUT_IDS, "TYPE_INT32", (-1,)),
    TensorSpec(NUM_CACHED_TOKENS, "TYPE_UINT32", (1,)),
)
"""Outputs that a request asks for with the BOOL input `return_<name>`."""

REQUEST_INPUTS = (
    TensorSpec(TEXT_INPUT, "TYPE_STRING", (1,)),
    TensorSpec(INPUT_IDS, "TYPE_INT32", (-1,)),
    TensorSpec(IMAGE, "TYPE_STRING", (-1,)),
    TensorSpec(STREAM, "TYPE_BOOL", (1,)),
    TensorSpec(SAMPLING_PARAMETERS, "TYPE_STRING", (1,)),
    TensorSpec(EXCLUDE_INPUT_IN_OUTPUT, "TYPE_BOOL", (1,)),
    *(TensorSpec(f"return_{output.name}", "TYPE_BOOL", (1,)) for output in OPTIONAL_OUTPUTS),
)
GENERATION_OUTPUTS = (TensorSpec(TEXT_OUTPUT, "TYPE_STRING", (-1,), optional=False), *OPTIONAL_OUTPUTS)
ABORT_PARAMETER = "abort"
"""A request with this Triton parameter and no inputs aborts the request of that id on a worker, and is answered with an empty
final response: the way out where Triton passes no cancellation on."""
HANDOFF = TensorSpec(KV_TRANSFER_PARAMS, "TYPE_STRING", (1,))
ENCODED = TensorSpec(EC_TRANSFER_PARAMS, "TYPE_STRING", (1,))
"""What an encode worker answers: JSON with the content ids of the images. As an input it only makes an ensemble wait for the encoder:
embeddings are found by what the images themselves are."""

OMNI_OPTIONAL = tuple(output for output in OPTIONAL_OUTPUTS if output.name in (FINISH_REASON, NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS))
"""What an omni worker can tell of the texts that it makes."""
OMNI_INPUTS = (
    *(spec for spec in REQUEST_INPUTS if not spec.name.startswith("return_")),
    TensorSpec(MODALITIES, "TYPE_STRING", (-1,)),
    TensorSpec(NEGATIVE_PROMPT, "TYPE_STRING", (1,)),
    *(TensorSpec(f"return_{output.name}", "TYPE_BOOL", (1,)) for output in OMNI_OPTIONAL),
)
OMNI_OUTPUTS = (
    TensorSpec(TEXT_OUTPUT, "TYPE_STRING", (-1,), optional=False),
    TensorSpec(IMAGE_OUTPUT, "TYPE_STRING", (-1,), optional=False),
    TensorSpec(AUDIO_OUTPUT, "TYPE_STRING", (-1,), optional=False),
    TensorSpec(MODALITY, "TYPE_STRING", (-1,), optional=False),
    *OMNI_OPTIONAL,
)
"""Images as PNG files, sound as a WAV file of what is new, and which of `text`, `image`, `audio` a response has."""


def inputs_of(role: Role) -> tuple[TensorSpec, ...]:
    """The inputs of a worker with this role."""
    if role is Role.ENCODE:
        return REQUEST_INPUTS
    if role is Role.OMNI:
        return OMNI_INPUTS
    return (*REQUEST_INPUTS, HANDOFF, ENCODED) if role is Role.DECODE else (*REQUEST_INPUTS, ENCODED)


def outputs_of(role: Role) -> tuple[TensorSpec, ...]:
    """The outputs of a worker with this role; a prefill worker answers with the handoff alone, an encode worker with its own."""
    return {Role.PREFILL: (HANDOFF,), Role.ENCODE: (ENCODED,), Role.OMNI: OMNI_OUTPUTS}.get(role, GENERATION_OUTPUTS)


def is_decoupled(role: Role) -> bool:
    """Whether the role's model answers with several responses.

    A prefill or encode model must not be decoupled: an ensemble step may not take inputs that come from two different decoupled
    origins, and the next one takes the ensemble's own inputs besides the handoff.
    """
    return role not in (Role.PREFILL, Role.ENCODE)
