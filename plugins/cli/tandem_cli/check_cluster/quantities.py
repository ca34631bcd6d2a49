# SPDX-License-Identifier: Apache-2.0
"""Kubernetes' quantities: `500m` cores, `16Gi` bytes, `8` GPUs."""

import re

_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
          "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_QUANTITY = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)")


def parse_quantity(text: object) -> float:
    """The number in units of one. Raises ValueError for what is no quantity."""
    match = _QUANTITY.fullmatch(str(text).strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no quantity")
    return float(match[1]) * _UNITS[match[2]]


def show_quantity(resource: str, value: float) -> str:
    """For people: memory and storage in GiB, all else as a number."""
    if resource.endswith(("memory", "storage")):
        return f"{value / 2**30:.1f} GiB"
    return f"{value:g}"
