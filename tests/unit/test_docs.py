# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does, where that can be checked."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tandem_kvbm.config import KvbmSettings
from tandem_kvbm.consolidator.config import ConsolidatorSettings
from tandem_planner.config import PlannerConfig
from tandem_planner.service_config import ServiceSettings
from tandem_protocol.kubernetes_access import PodSettings
from tandem_protocol.settings import specs_of
from tandem_protocol.version import VERSION
from tandem_router.config import RouterSettings
from tandem_worker.config import WorkerSettings
from tandem_worker.encode.config import EmbeddingSettings
from tandem_worker.images.config import ImageSettings
from tandem_worker.omni.config import OmniSettings

ROOT = Path(__file__).parents[2]
DASH = "\N{EN DASH}"
SETTINGS = (WorkerSettings, ImageSettings, OmniSettings, EmbeddingSettings, RouterSettings, KvbmSettings, ConsolidatorSettings,
            PlannerConfig, ServiceSettings, PodSettings)


@pytest.mark.parametrize(
    ("settings", "name"), [(settings, name) for settings in SETTINGS for name in specs_of(settings)]
)
def test_every_setting_is_documented_with_its_default(settings: type[Any], name: str) -> None:
    """docs/configuration.md has a row for each setting: variable, name, default, unit, and the very help text."""
    spec = specs_of(settings)[name]
    default = {field.name: field.default for field in dataclasses.fields(settings)}[name]
    shown = "unset" if default in (None, "", ()) else str(default).lower() if isinstance(default, bool) else str(default)
    flag = f"`--{name.replace('_', '-')}`" if spec.flag else DASH
    row = f"| `{spec.env}` | {flag} | `{name}` | {shown} | {spec.unit or DASH} | {spec.help} |"
    assert row in (ROOT / "docs" / "configuration.md").read_text()


DOCUMENTS = ("README.md", "docs/architecture.md", "docs/configuration.md", "docs/limits.md", "docs/checkpoint.md", "docs/planner.md",
             "docs/multimodal.md",
             "docs/kubernetes.md", "docs/deploy.md", "docs/upgrade.md", "docs/troubleshooting.md", "examples/README.md",
             "benchmarks/README.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_path_in_the_documents_exists(document: str) -> None:
    """Relative links and the test files that the README names are there."""
    path = ROOT / document
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    files = re.findall(r"`((?:tests|benchmarks|docs|plugins)/[\w/.]+\.(?:py|md|sh))`", text)
    missing = [link for link in links if not (path.parent / link).exists()] + [file for file in files if not (ROOT / file).exists()]
    assert missing == []


def test_the_version_is_a_version() -> None:
    """It stands in one place."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
