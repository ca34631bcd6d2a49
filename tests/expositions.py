# SPDX-License-Identifier: Apache-2.0
"""Reads Prometheus' text format in tests, and asks promtool about it."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass

TOOL = shutil.which("promtool")
_NOT_OURS = re.compile(r"^(vllm|lmcache):|^nv_|^python_|^process_|^kvbm_")
"""Whose names are not ours to change: vLLM's colons, Triton's counters without `_total`, Dynamo's habits."""


@dataclass(frozen=True)
class Exposition:
    """One scrape."""

    text: str

    @property
    def samples(self) -> dict[str, float]:
        """Every series by its name with labels."""
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in self._lines}

    @property
    def doubles(self) -> list[str]:
        """Series that are there more than once."""
        return [series for series, count in Counter(line.rsplit(" ", 1)[0] for line in self._lines).items() if count > 1]

    def sum_of(self, name: str, *parts: str) -> float:
        """All series of a name whose labels hold each of these parts, e.g. `model="m"`."""
        wanted = (f"{name}{{", f"{name} ")
        found = {series: value for series, value in self.samples.items() if f"{series} ".startswith(wanted)}
        return sum(value for series, value in found.items() if all(part in series for part in parts))

    def complaints(self) -> list[str]:
        """What promtool dislikes about names that are ours to choose. Fails the test where it can't parse the text at all."""
        assert TOOL is not None
        checked = subprocess.run([TOOL, "check", "metrics"], input=self.text.encode(), capture_output=True, timeout=60, check=False)
        said = (checked.stdout + checked.stderr).decode().splitlines()
        assert checked.returncode in {0, 3}, said  # 3: it parses, and there are remarks
        return [line for line in said if not _NOT_OURS.search(line)]

    @property
    def _lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line and not line.startswith("#")]
