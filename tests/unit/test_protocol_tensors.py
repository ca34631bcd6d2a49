# SPDX-License-Identifier: Apache-2.0
"""The tensor contract, and that the shipped ensemble declares exactly it."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tandem_protocol import tensors
from tandem_protocol.roles import Role

REPOSITORY = Path(__file__).parents[2] / "model_repository"


def load_config(name: str) -> Any:
    """A shipped config.pbtxt, as Triton parses it."""
    return text_format.Parse((REPOSITORY / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def declared(entries: Any) -> set[tuple[str, str, tuple[int, ...]]]:
    """Name, type and dims of what a config.pbtxt declares."""
    return {(entry.name, model_config_pb2.DataType.Name(entry.data_type), tuple(entry.dims)) for entry in entries}


def contract(specs: tuple[tensors.TensorSpec, ...]) -> set[tuple[str, str, tuple[int, ...]]]:
    """Name, type and dims of the contract."""
    return {(spec.name, spec.data_type, spec.dims) for spec in specs}


CHAINS = {
    "disagg": (Role.PREFILL, Role.DECODE),
    "encode_agg": (Role.ENCODE, Role.AGGREGATED),
    "encode_disagg": (Role.ENCODE, Role.PREFILL, Role.DECODE),
}


@pytest.fixture(params=CHAINS)
def chain(request: pytest.FixtureRequest) -> str:
    """The name of a shipped ensemble."""
    return str(request.param)


@pytest.fixture
def ensemble(chain: str) -> Any:
    """A shipped ensemble."""
    return load_config(chain)


@pytest.mark.parametrize(
    ("role", "decoupled"), [(Role.AGGREGATED, True), (Role.DECODE, True), (Role.PREFILL, False), (Role.ENCODE, False)]
)
def test_only_prefill_and_encode_answer_once(role: Role, decoupled: bool) -> None:
    """An ensemble step can't take inputs of two decoupled origins."""
    assert tensors.is_decoupled(role) is decoupled


@pytest.mark.parametrize(
    ("model", "role"), [("vllm", Role.AGGREGATED), ("prefill", Role.PREFILL), ("decode", Role.DECODE), ("encode", Role.ENCODE)]
)
def test_shipped_workers_declare_their_roles_policy(model: str, role: Role) -> None:
    """config.pbtxt and contract agree on who is decoupled."""
    config = load_config(model)
    assert config.model_transaction_policy.decoupled is tensors.is_decoupled(role)
    assert config.parameters["role"].string_value == role.value


@pytest.mark.parametrize(
    ("role", "takes", "gives"), [(Role.AGGREGATED, False, False), (Role.PREFILL, False, True), (Role.DECODE, True, False)]
)
def test_the_handoff_goes_from_prefill_to_decode_alone(role: Role, takes: bool, gives: bool) -> None:
    """No other role has the tensor."""
    assert (tensors.HANDOFF in tensors.inputs_of(role)) is takes
    assert (tensors.HANDOFF in tensors.outputs_of(role)) is gives


def test_every_optional_output_can_be_asked_for() -> None:
    """Each has its BOOL input `return_<name>`."""
    flags = {spec.name for spec in tensors.REQUEST_INPUTS if spec.data_type == "TYPE_BOOL"}
    assert {f"return_{spec.name}" for spec in tensors.OPTIONAL_OUTPUTS} <= flags


@pytest.mark.parametrize("role", list(Role))
def test_names_are_unique(role: Role) -> None:
    """No tensor is declared twice."""
    for specs in (tensors.inputs_of(role), tensors.outputs_of(role)):
        assert len({spec.name for spec in specs}) == len(specs)


def test_the_ensemble_declares_the_contract(ensemble: Any) -> None:
    """Its inputs and outputs are those of an aggregated worker, so that clients can't tell the two apart."""
    assert declared(ensemble.input) == contract(tensors.REQUEST_INPUTS)
    assert declared(ensemble.output) == contract(tensors.outputs_of(Role.AGGREGATED))


def test_every_input_of_the_ensemble_is_optional(ensemble: Any) -> None:
    """Triton refuses requests that leave out an input which the ensemble itself doesn't call optional."""
    assert [entry.name for entry in ensemble.input if not entry.optional] == []


def test_each_step_maps_all_tensors_of_its_role(ensemble: Any, chain: str) -> None:
    """Under their own names: a tensor that isn't mapped would silently be missing. Besides the request's own a step takes the outputs
    of the one before it."""
    before: tuple[tensors.TensorSpec, ...] = ()
    for step, role in zip(ensemble.ensemble_scheduling.step, CHAINS[chain], strict=True):
        assert set(before) <= set(tensors.inputs_of(role))
        assert dict(step.input_map) == {spec.name: spec.name for spec in (*tensors.REQUEST_INPUTS, *before)}
        before = tensors.outputs_of(role)
        assert dict(step.output_map) == {spec.name: spec.name for spec in before}
