# SPDX-License-Identifier: Apache-2.0
"""Engines that `tandem profile` starts itself, one per parallelism, each measured into a folder of its own: OUT/tpN.

What is whole is not measured again; a choice that doesn't start is reported with its reason, and the others go on.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tandem_cli.profile.server import grid_plan, kv_tokens_of, measure_server, say
from tandem_cli.profile.started import Start, served
from tandem_planner.profile_data import Profile, read_profile
from tandem_planner.profiler.grid import GridPlan
from tandem_planner.profiler.journal import Subject
from tandem_protocol.durable import replace_file
from tandem_protocol.errors import TandemError

_WHOLE = "whole.json"


class _Whole(msgspec.Struct, frozen=True):
    """What a folder holds every point of."""

    subject: Subject
    plan: GridPlan
    only: str | None


@dataclass(frozen=True)
class Choices:
    """What became of all choices."""

    profiles: Mapping[int, Profile]
    """By tensor-parallel size; with what was measured."""
    failed: Mapping[int, str]
    """Why a choice has none."""
    whole: bool
    """Whether nothing was cut short."""


def measure_choices(args: argparse.Namespace, sizes: tuple[int, ...]) -> Choices:
    """One after the other, within `--limit-s` in all, starts included."""
    until_s = None if args.limit_s is None else time.monotonic() + args.limit_s
    profiles: dict[int, Profile] = {}
    failed: dict[int, str] = {}
    for size in sizes:
        left_s = None if until_s is None else until_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            return Choices(profiles, {**failed, size: "no time was left for it: run the same command again"}, whole=False)
        say(f"tensor-parallel size {size}:")
        try:
            profiles[size], whole = _measure_choice(args, size, args.out / f"tp{size}", left_s)
        except TandemError as exc:
            failed[size] = str(exc)
            say(f"left out: {exc}")
            continue
        if not whole:
            return Choices(profiles, failed, whole=False)
    return Choices(profiles, failed, whole=True)


def _measure_choice(args: argparse.Namespace, size: int, folder: Path, limit_s: float | None) -> tuple[Profile, bool]:
    what = " ".join(["tandem serve", args.model or "", *args.passthrough])
    subject = Subject(what, "vllm", size, args.repeats, args.seed)
    if _is_whole(folder, args, subject):
        say(f"it is in {folder} already")
        return read_profile(folder), True
    until_s = None if limit_s is None else time.monotonic() + limit_s
    with served(Start(args.model, size, args.passthrough, args.start_timeout_s), folder) as engine:
        plan = grid_plan(args, args.max_kv_tokens or kv_tokens_of(engine.admin))
        left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
        measured = measure_server(args, folder, plan, subject, engine.url, left_s)
    if measured.whole:
        replace_file(folder / _WHOLE, msgspec.json.encode(_Whole(subject, plan, args.only)))
    return measured.profile, measured.whole


def _is_whole(folder: Path, args: argparse.Namespace, subject: Subject) -> bool:
    """Whether it has every point that is asked for now; the size of the KV cache is that of the engine which was measured."""
    try:
        found = msgspec.json.decode((folder / _WHOLE).read_bytes(), type=_Whole)
    except (OSError, msgspec.MsgspecError):
        return False
    return found == _Whole(subject, grid_plan(args, found.plan.max_kv_tokens), args.only)
