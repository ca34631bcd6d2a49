# SPDX-License-Identifier: Apache-2.0
"""Lets torchvision be imported beside a torch for CPUs, where its index has only the build for CUDA: in vllm-omni's environment alone.

torchvision's operators are in a library that needs CUDA's. Where it doesn't load, torchvision would go on without them (its transforms are
plain torch), but for two operators that it describes whether they are there or not. So these two are declared before it is imported.
Nothing implements them: who calls one is told by torchvision that its operators are missing. A build for CPUs keeps its own.

`./build.sh omni-env` has this installed at the start of every process of the environment, by a line in its `.pth`; hence no import of torch
until torchvision is wanted.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

_NAME = "torchvision"
_DESCRIBED = ("nms", "qnms")
_libraries: list[object] = []
"""Operators live as long as their library."""


def install() -> None:
    """For this process, before anything imports torchvision."""
    sys.meta_path.insert(0, Finder(declare_missing_operators))


class Finder(MetaPathFinder):
    """Finds torchvision where it is, and has `before` called with its folder ahead of its import; no other module is concerned."""

    def __init__(self, before: Callable[[Path], None], name: str = _NAME) -> None:
        self._before = before
        self._name = name

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As the import system asks; to be found is not yet to be imported."""
        spec = PathFinder.find_spec(fullname, path) if fullname == self._name else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin, self._before)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, before: Callable[[Path], None]) -> None:
        super().__init__(fullname, path)
        self._before = before

    def exec_module(self, module: ModuleType) -> None:
        """The package's own code, after ours."""
        self._before(Path(self.path).parent)
        super().exec_module(module)


def declare_missing_operators(folder: Path) -> None:
    """Declares them unless the library in torchvision's `folder` loads."""
    import torch

    try:
        torch.ops.load_library(str(folder / "_C.so"))
    except OSError:
        library = torch.library.Library(_NAME, "DEF")
        for name in _DESCRIBED:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
