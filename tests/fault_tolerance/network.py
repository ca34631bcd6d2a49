# SPDX-License-Identifier: Apache-2.0
"""A prefill worker on a host of its own, as far as the network goes: a namespace with two cables, one for everything and one for KV.

NIXL's handshake and UCX's data take the second one; with that pulled, prefill and decode are cut apart, and all else goes on.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_COMMAND_S = 20
_SPACE = "tandem-far"
_NEAR, _FAR = ("tdm-main0", "tdm-kv0"), ("tdm-main1", "tdm-kv1")
_NETS = ("10.213.77", "10.213.78")


def possible() -> bool:
    """Whether namespaces can be made here."""
    return os.geteuid() == 0 and None not in (shutil.which("ip"), shutil.which("iptables"))


def _ip(*arguments: str, inside: bool = False, check: bool = True) -> None:
    command = ["ip", *(("-n", _SPACE) if inside else ()), *arguments]
    subprocess.run(command, check=check, capture_output=True, timeout=_COMMAND_S)


@dataclass(frozen=True)
class KvLink:
    """Both cables, laid."""

    far_address: str = f"{_NETS[0]}.2"
    """Of the namespace, for everything but KV."""
    inside: tuple[str, ...] = ("ip", "netns", "exec", _SPACE)
    """What a command begins with to run in the namespace."""

    @classmethod
    @contextlib.contextmanager
    def laid(cls) -> Iterator["KvLink"]:
        """From here to the end of the context; what an earlier run left is removed first."""
        _remove()
        _ip("netns", "add", _SPACE)
        try:
            _ip("link", "set", "lo", "up", inside=True)
            for near, far, net in zip(_NEAR, _FAR, _NETS, strict=True):
                _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", _SPACE)
                _ip("addr", "add", f"{net}.1/24", "dev", near)
                _ip("addr", "add", f"{net}.2/24", "dev", far, inside=True)
                _ip("link", "set", near, "up")
                _ip("link", "set", far, "up", inside=True)
            yield cls()
        finally:
            _remove()

    def variables(self, *, far: bool) -> dict[str, str]:
        """For a worker at either end: KV takes the second cable, by TCP, as between two hosts without RDMA."""
        return {"UCX_TLS": "tcp", "UCX_NET_DEVICES": (_FAR if far else _NEAR)[1],
                "VLLM_NIXL_SIDE_CHANNEL_HOST": f"{_NETS[1]}.{2 if far else 1}"}

    def cut(self) -> None:
        """The second cable drops everything. (Its devices stay up: a host seldom notices that a switch died.)"""
        self._filter("-I")

    def mend(self) -> None:
        """Ends `cut`."""
        self._filter("-D")

    def _filter(self, change: str) -> None:
        for command, device in (((), _NEAR[1]), (self.inside, _FAR[1])):
            subprocess.run([*command, "iptables", "-w", change, "INPUT", "-i", device, "-j", "DROP"], check=True, capture_output=True,
                           timeout=_COMMAND_S)


def _remove() -> None:
    _ip("netns", "del", _SPACE, check=False)
    for near in _NEAR:
        _ip("link", "del", near, check=False)
