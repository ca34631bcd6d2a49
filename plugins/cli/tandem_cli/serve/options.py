# SPDX-License-Identifier: Apache-2.0
"""Options of `tandem serve`; what is not here is an engine argument of vLLM.

Worker settings become flags by their own declaration (`tandem_worker.config`), and reach the workers as environment
variables: a flag wins over the environment, which wins over config.pbtxt.
"""

import argparse
import os
from dataclasses import dataclass
from typing import Any

from tandem_cli.serve.engine_arguments import parse_engine_arguments, read_arguments
from tandem_cli.serve.fleet import Counts, Mode
from tandem_cli.serve.omni import OmniOptions
from tandem_cli.serve.omni_environment import VARIABLE, chosen_folder
from tandem_kvbm.config import KvbmSettings
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_protocol.settings import SettingSpec, parse_bool, parse_value, specs_of
from tandem_router.config import RouterSettings
from tandem_worker.config import WorkerSettings

START_TIMEOUT_S = 900
KV_SPACE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
KV_SPACE_GIB = 1
"""KV space of a CPU engine unless set: vLLM's own default takes half of the memory, which two engines can't both do."""


@dataclass(frozen=True)
class ServeOptions:
    """What was asked for, checked as far as that goes without looking at the machine."""

    model: str | None
    mode: Mode
    only: Role | None
    counts: Counts
    http_port: int
    grpc_port: int
    metrics_port: int
    detach: bool
    start_timeout_s: int
    environment: dict[str, str]
    """Worker settings given as flags, as environment variables."""
    engine_arguments: dict[str, Any]
    omni: OmniOptions | None = None
    """A pipeline instead of engines; its arguments stand in `engine_arguments`, unchecked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--model", help="model folder or hub id (default: TANDEM_MODEL, else the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--mode", choices=[mode.value for mode in Mode],
                        help="agg: model vllm; disagg: prefill, decode and the ensemble disagg; both (default): all of them")
    parser.add_argument("--workers", type=int, default=1, metavar="N",
                        help="aggregated workers: vllm, vllm_1, ... (default 1); 0 with --mode agg: routers alone")
    parser.add_argument("--routers", type=int, default=None, metavar="N",
                        help="instances of the model router, each a process; 0 for none (default 1, and 0 for a host of one role)")
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill workers (default 1)")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="decode workers (default 1)")
    parser.add_argument("--encode", type=int, default=0, metavar="N",
                        help="encode workers, which compute the embeddings of images for all others (default 0)")
    parser.add_argument("--http-port", type=int, default=8000, help="default 8000")
    parser.add_argument("--grpc-port", type=int, default=8001, help="default 8001")
    parser.add_argument("--metrics-port", type=int, default=8002, help="default 8002")
    parser.add_argument("--detach", action="store_true", help="return when ready instead of following the log")
    parser.add_argument("--start-timeout", type=int, default=START_TIMEOUT_S, metavar="S",
                        help=f"seconds to wait (default {START_TIMEOUT_S})")
    _add_omni(parser.add_argument_group("omni", "a pipeline of vllm-omni as the model `omni`, and nothing else; see docs/omni.md"))
    workers = parser.add_argument_group("worker settings", "for every worker of this server; see docs/configuration.md")
    for name, spec in specs_of(WorkerSettings).items():
        if spec.flag:
            _add_setting(workers, name, spec.parse is parse_bool, f"{spec.help} [{spec.env}]")
    tiers = parser.add_argument_group("KV tiers", "of workers with the connector kvbm; see docs/configuration.md")
    for name, spec in kvbm_specs().items():
        _add_setting(tiers, name, spec.parse is parse_bool, f"{spec.help} [{spec.env}]")
    routers = parser.add_argument_group("router settings", "see docs/configuration.md")
    for name, spec in router_specs().items():
        _add_setting(routers, name, spec.parse is parse_bool, f"{spec.help} [{spec.env}]")
    parser.epilog = "Everything else is an engine argument of vLLM, e.g. --max-model-len 2048 --enforce-eager; with --omni of AsyncOmni."


def _add_omni(group: Any) -> None:
    group.add_argument("--omni", action="store_true", help="serve the pipeline --model")
    group.add_argument("--omni-env", metavar="FOLDER",
                       help=f"vllm-omni's environment (default: {VARIABLE}, else the one that ./build.sh omni-env made)")
    group.add_argument("--deploy-config", "--stage-configs-path", metavar="FILE",
                       help="vllm-omni's deploy configuration: devices, memory and defaults of each stage (default: the model's own)")


def router_specs() -> dict[str, SettingSpec]:
    """The router's settings that are flags. Where a worker has one of that name, the flag is the worker's."""
    return {name: spec for name, spec in specs_of(RouterSettings).items() if spec.flag and name not in specs_of(WorkerSettings)}


def kvbm_specs() -> dict[str, SettingSpec]:
    """The settings of KV tiers that are flags."""
    return {name: spec for name, spec in specs_of(KvbmSettings).items() if spec.flag}


def _add_setting(group: Any, name: str, is_bool: bool, text: str) -> None:
    flag, text = f"--{name.replace('_', '-')}", text.replace("%", "%%")
    if is_bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif name.endswith("connector"):
        group.add_argument(flag, nargs="+", help=text)
    else:
        group.add_argument(flag, help=text)


def parse_options(args: argparse.Namespace) -> ServeOptions:
    """Checks options and settings. Raises ConfigError."""
    environment = _environment(args)
    only = _only(environment)
    omni = _omni(args, only)
    if only is not None and args.mode is not None:
        raise ConfigError(f"--is-{only}-worker serves one role alone, so it can't be combined with --mode {args.mode}: drop one of them")
    return ServeOptions(
        model=args.model or os.environ.get("TANDEM_MODEL") or None,
        mode=Mode(args.mode or Mode.BOTH),
        only=only,
        counts=Counts(args.workers, args.prefill, args.decode, 0 if omni else _routers(args.routers, only), args.encode),
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        detach=args.detach,
        start_timeout_s=args.start_timeout,
        environment=environment,
        engine_arguments=read_arguments(args.passthrough) if omni else parse_engine_arguments(args.passthrough),
        omni=omni,
    )


def _omni(args: argparse.Namespace, only: Role | None) -> OmniOptions | None:
    """A pipeline has a server of its own, so what is for engines does not fit it."""
    if not args.omni:
        if args.omni_env or args.deploy_config:
            raise ConfigError("--omni-env and --deploy-config are for a pipeline of vllm-omni: give --omni, too")
        return None
    if only is not None or args.mode or args.routers or args.encode or (args.workers, args.prefill, args.decode) != (1, 1, 1):
        raise ConfigError("--omni serves one pipeline and nothing else: leave out --mode, the roles and the numbers of workers and "
                          "routers, and start other servers for them on ports of their own")
    return OmniOptions(chosen_folder(args.omni_env), args.deploy_config)


def _environment(args: argparse.Namespace) -> dict[str, str]:
    environment = {}
    for name, spec in (router_specs() | kvbm_specs() | specs_of(WorkerSettings)).items():
        value = getattr(args, name, None) if spec.flag else None
        if value is not None:
            text = " ".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else value
            parse_value(spec, f"--{name.replace('_', '-')}", text)
            environment[spec.env] = text
    return environment


def _routers(given: int | None, only: Role | None) -> int:
    """A host of one role has only a part of the fleet, and without discovery there is none to route over."""
    if given is not None:
        return given
    return 0 if only is not None or os.environ.get("TANDEM_DISCOVERY") == "" else 1


def _only(flags: dict[str, str]) -> Role | None:
    """The one role to serve, from flags or environment."""
    variables = {"DYN_VLLM_IS_PREFILL_WORKER": Role.PREFILL, "DYN_VLLM_IS_DECODE_WORKER": Role.DECODE}
    wanted = [role for name, role in variables.items() if parse_bool(flags.get(name) or os.environ.get(name) or "false")]
    if len(wanted) > 1:
        raise ConfigError("--is-prefill-worker and --is-decode-worker exclude each other: set one of them")
    return wanted[0] if wanted else None
