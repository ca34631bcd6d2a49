# SPDX-License-Identifier: Apache-2.0
"""Labels that tell a fleet's workers apart. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem_protocol.roles import Role

ENDPOINT = "generate"
"""Dynamo's name of the endpoint that every worker has."""


@dataclass(frozen=True)
class Labels:
    """What is added to series that don't have it: a series' own labels come before ours, and ours before the operator's."""

    ours: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, str] = field(default_factory=dict)

    def added_to(self, own: Mapping[str, str]) -> dict[str, str]:
        """All labels of a series. vLLM calls a data-parallel rank `engine`."""
        rank = {"dp_rank": own["engine"]} if "engine" in own else {}
        return {**self.operators, **self.ours, **rank, **own}


def dynamo_labels(namespace: str, role: Role, model: str, model_name: str) -> dict[str, str]:
    """As Dynamo labels the metrics of its components: decode workers are its backend, too."""
    component = {Role.PREFILL: "prefill", Role.ENCODE: "encoder"}.get(role, "backend")
    return {"dynamo_namespace": namespace, "dynamo_component": component, "dynamo_endpoint": ENDPOINT, "model": model,
            "model_name": model_name}


def parse_labels(text: str) -> dict[str, str]:
    """`name=value,name=value`. Raises ValueError naming the part that isn't one."""
    labels = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier() or not name.isascii() or name.startswith("__"):
            raise ValueError(f"{part!r} is no label, write name=value, separated by commas, with letters, digits and _ in names")
        labels[name] = value
    return labels


def check_labels(text: str) -> str:
    """For the setting. Raises ValueError."""
    parse_labels(text)
    return text
