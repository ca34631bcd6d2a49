# SPDX-License-Identifier: Apache-2.0
"""A real Docker Engine for tests: its socket and data in a folder of the test's own, and a tiny image of this machine's own shell."""

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker

from servers import wait_for

_START_TIMEOUT_S = 90.0
DAEMON = shutil.which("dockerd")
IMAGE = "tandem-shell:latest"
_PROGRAMS = ("/bin/sh", "/bin/sleep", "/bin/true")


@contextmanager
def docker_engine(folder: Path) -> Iterator[str]:
    """An engine without networks or a registry; its address. It and its containers are gone at the end."""
    assert DAEMON is not None
    address = f"unix://{folder / 'docker.sock'}"
    with (folder / "dockerd.log").open("wb") as log:
        process = subprocess.Popen(
            [DAEMON, "--storage-driver=vfs", "--iptables=false", "--bridge=none", f"--host={address}", f"--data-root={folder / 'data'}",
             f"--exec-root={folder / 'exec'}", f"--pidfile={folder / 'pid'}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(lambda: _answers(address), _START_TIMEOUT_S, f"the Docker Engine answers; see {folder / 'dockerd.log'}")
        yield address
        _remove_containers(address)
    finally:
        process.terminate()
        process.wait(60)


def _answers(address: str) -> bool:
    try:
        client = docker.DockerClient(base_url=address, timeout=5)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except (docker.errors.DockerException, OSError):
        return False
    finally:
        client.close()


def _remove_containers(address: str) -> None:
    client = docker.DockerClient(base_url=address, timeout=30)
    for one in client.containers.list(all=True):
        one.remove(force=True)
    client.close()


def import_shell(client: Any) -> None:
    """Makes `IMAGE`: a shell, `sleep` and what they link to; no registry is asked."""
    answer = client.api.import_image_from_data(_shell_tar(), repository=IMAGE.split(":")[0], tag="latest")
    assert "sha256:" in answer, answer


def _shell_tar() -> bytes:
    files = {path: path for path in _PROGRAMS}
    for program in _PROGRAMS:
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=20, check=True).stdout
        files.update({path: path for path in re.findall(r"(/\S+) \(0x", listed)})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for folder in ("tmp", "proc", "sys", "dev", "etc"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, path in files.items():
            tar.add(os.path.realpath(path), arcname=name.lstrip("/"))
    return packed.getvalue()
