# SPDX-License-Identifier: Apache-2.0
"""Raises an exception where a test wants one, in processes that no test reaches into: while a file of the place's name is in the folder.

Installed by `sitecustomize` in Python's own processes, and by a copy of model.py in Triton's stubs, which ignore PYTHONPATH.
"""

import functools
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER_VARIABLE = "TANDEM_TEST_SPOILS"
PLACES = {
    "vllm.v1.core.sched.scheduler": ("engine_step", "Scheduler.schedule"),
    "tandem_worker.load": ("engine_client", "EngineLoad.record"),
    "tandem_worker.generation": ("worker_request", "Generator._run"),
    "tandem_worker.shared_memory": ("guard_look", "mapped_files"),
    "tandem_router.dispatch": ("router_request", "Dispatcher._place"),
    "tandem_kvbm.consolidator.pump": ("consolidator_turn", "Pump._turn"),
}
"""By module: the place, and what raises there."""


class SpoiledError(RuntimeError):
    """Nobody expects it."""


def install() -> None:
    """From now on the modules above are spoiled as they are imported, here and in processes that `multiprocessing` spawns."""
    sys.meta_path.insert(0, _Finder())
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) is None:  # Triton's stub: its EngineCore ignores PYTHONPATH, but runs this file first
        main.__file__ = str(Path(__file__).with_name("sitecustomize.py"))


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname in PLACES else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    execute(module)
    place, name = PLACES[module.__name__]
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, module)
    setattr(owner, last, _spoiled(getattr(owner, last), Path(os.environ[FOLDER_VARIABLE]) / place))


def _spoiled(good: Callable[..., Any], file: Path) -> Callable[..., Any]:
    @functools.wraps(good)
    def spoiled(*given: Any, **named: Any) -> Any:
        if file.exists():
            raise SpoiledError(f"spoiled by a test: {file.name}")
        return good(*given, **named)

    return spoiled
