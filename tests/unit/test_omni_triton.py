# SPDX-License-Identifier: Apache-2.0
"""What the Triton model of an omni worker has of its own, over a double of the module that only exists inside tritonserver."""

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from fakes import reader
from tandem_protocol import tensors
from tandem_protocol.errors import ConfigError
from tandem_protocol.requests import Envelope
from tandem_protocol.roles import Role
from tandem_worker.config import WorkerSettings

MODULES = ("tandem_protocol.triton", "tandem_worker.triton", "tandem_worker.omni.triton")


class ModelConfig:
    """Triton's, of a config.pbtxt that says a role and no tensors."""

    def __init__(self, role: str) -> None:
        self._given = {"input": [], "output": [], "parameters": {"role": {"string_value": role}}}
        self.declared: dict[str, Any] = {"inputs": [], "outputs": []}

    def as_dict(self) -> dict[str, Any]:
        """What stands in the file."""
        return self._given

    def add_input(self, tensor: dict[str, Any]) -> None:
        """One more."""
        self.declared["inputs"].append(tensor["name"])

    def add_output(self, tensor: dict[str, Any]) -> None:
        """One more."""
        self.declared["outputs"].append(tensor["name"])

    def set_max_batch_size(self, size: int) -> None:
        """Of the model."""
        self.declared["batch"] = size

    def set_model_transaction_policy(self, policy: dict[str, bool]) -> None:
        """Of the model."""
        self.declared |= policy


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class that Triton looks for."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(MODULES[-1]).TritonPythonModel
    for name in MODULES:
        sys.modules.pop(name, None)


def test_it_declares_the_tensors_of_a_pipeline(model: Any) -> None:
    """Several responses to a request."""
    config = model.auto_complete_config(ModelConfig("omni"))
    assert config.declared == {"inputs": [spec.name for spec in tensors.OMNI_INPUTS], "batch": 0, "decoupled": True,
                               "outputs": [spec.name for spec in tensors.OMNI_OUTPUTS]}


def test_it_serves_no_other_role(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by its own parameter nor by a variable that is meant for others."""
    assert model().settings_of({"role": "omni"}) == WorkerSettings(role=Role.OMNI)
    with pytest.raises(ConfigError, match="its role is aggregated: set `role` to omni"):
        model().settings_of({"role": "aggregated"})
    monkeypatch.setenv("DYN_VLLM_IS_PREFILL_WORKER", "true")
    with pytest.raises(ConfigError, match="its role is prefill"):
        model().settings_of({"role": "omni"})


def test_its_requests_hold_what_only_pipelines_take(model: Any) -> None:
    """Beside what all take."""
    given = {"text_input": "a cat", "modalities": [b"image"], "negative_prompt": [b"a dog"]}
    request = model().request_of(reader(given), Envelope("r", {}))
    assert (request.prompt, request.modalities, request.negative_prompt) == ("a cat", ("image",), "a dog")
