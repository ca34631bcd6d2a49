# SPDX-License-Identifier: Apache-2.0
"""Starts the real tritonserver with vLLM workers, waits until all models answer, and follows its log.

Options that are not listed here are engine arguments of vLLM and are passed through, e.g. --max-model-len 2048.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from types import FrameType
from urllib.parse import quote

import psutil

from tandem_cli.serve import options as serve_options
from tandem_cli.serve.checkpoints import checkpoint_was_taken, existing_checkpoint
from tandem_cli.serve.command_stop import stop_run
from tandem_cli.serve.consolidators import Sidecar, plan_sidecars, start_sidecars, workers_environment
from tandem_cli.serve.embedded_model import embedded_model
from tandem_cli.serve.fleet import ROUTER, Fleet, Hardware, WorkerPlan, plan_fleet
from tandem_cli.serve.headless import FOLLOWER, follower_options, start_follower, wait_until_tied
from tandem_cli.serve.layout import RunFolder, run_folder, source_root
from tandem_cli.serve.omni import MODEL as PIPELINE
from tandem_cli.serve.omni import MODEL_FILES, plan_pipeline
from tandem_cli.serve.omni_environment import probe
from tandem_cli.serve.options import KV_SPACE_GIB, KV_SPACE_VARIABLE, ServeOptions, parse_options
from tandem_cli.serve.preflight import GIB, Port, check_memory, check_model, check_ports, check_shared_memory, detect_hardware
from tandem_cli.serve.readiness import tail, wait_until_ready
from tandem_cli.serve.repository import write_repository
from tandem_cli.serve.run_state import RUN_ID_VARIABLE, RunState, read_state, write_state
from tandem_cli.serve.tiers import check_tiers
from tandem_cli.serve.tritonserver import find_triton, join_backends, server_command, server_environment
from tandem_protocol.errors import ConfigError, EngineError
from tandem_protocol.roles import Role
from tandem_router.config import load_settings as load_router_settings
from tandem_worker.arguments import REPLAY_PORT_OFFSET
from tandem_worker.config import WorkerSettings, load_settings
from tandem_worker.connectors import parse_connectors, transfer_config
from tandem_worker.encode.config import EMBEDDING_FOLDER
from tandem_worker.ranks import HEADLESS, local_ranks

_FOLLOW_POLL_S = 0.2
_EXIT_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `serve`."""
    serve_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `tandem serve`; 0 when it was stopped, 1 when the server failed."""
    options = parse_options(args)
    headless = bool(options.engine_arguments.get(HEADLESS))
    options = follower_options(options) if headless else options
    folder = run_folder(options.http_port)
    _refuse_second_run(folder)
    hardware = detect_hardware()
    fleet = _plan(options, hardware)
    settings = [_settings(worker, options) for worker in fleet.workers]
    if there := existing_checkpoint(settings, options.counts.routers):
        print(there, flush=True)
        return 0
    check_tiers(settings, {**os.environ, **options.environment})
    if headless:
        return _follow_a_leader(options, fleet, settings[0], folder, hardware)
    routers = _router_ports(options)
    sidecars = plan_sidecars(settings, options.engine_arguments, {**os.environ, **options.environment}, folder)
    check_ports([*_ports(options, settings), *(Port(port, "admin of the router", "--router-admin-port") for port in routers),
                 *(port for sidecar in sidecars for port in sidecar.ports())])
    if options.model:
        check_model(options.model, MODEL_FILES if options.omni else ("config.json",))
    options = replace(options, model=options.model or str(embedded_model()))
    environment = {**_discovery(options, folder), **_embeddings(fleet, folder), **workers_environment(sidecars),
                   **_environment(options, fleet, hardware)}
    state = _start(options, fleet, settings, folder, environment, routers, sidecars)
    try:
        return _serve(state, folder, options)
    except EngineError:
        if not checkpoint_was_taken(settings):
            raise
    print("the checkpoint was taken, and its server ended", flush=True)
    return 0


def _plan(options: ServeOptions, hardware: Hardware) -> Fleet:
    if options.omni is None:
        return plan_fleet(options.mode, options.counts, options.only, hardware, options.engine_arguments)
    if not options.model:
        raise ConfigError("--omni serves the pipeline that --model names: give its folder or hub id")
    return plan_pipeline(options.omni, probe(options.omni.environment), options.model, options.engine_arguments, hardware.gpus)


def _serve(state: RunState, folder: RunFolder, options: ServeOptions) -> int:
    """Waits for readiness and follows; whatever goes wrong, nothing is left running."""
    ready = False
    try:
        wait_until_ready(state, folder.log, options.start_timeout_s)
        ready = True
        print(_summary(state, folder), flush=True)
        return 0 if options.detach else _follow(state, folder)
    finally:
        if not (ready and options.detach):
            stop_run(folder)


def _follow_a_leader(options: ServeOptions, fleet: Fleet, settings: WorkerSettings, folder: RunFolder, hardware: Hardware) -> int:
    if settings.effective_admin_port <= 0:
        raise ConfigError("a follower is asked at its admin port whether it lives: set --admin-port")
    check_ports(_worker_ports(options, [settings]))
    if options.model:
        check_model(options.model)
    options = replace(options, model=options.model or str(embedded_model()))
    run_id = uuid.uuid4().hex
    environment = {**os.environ, **_environment(options, fleet, hardware), RUN_ID_VARIABLE: run_id}
    url = f"http://{settings.admin_host}:{settings.effective_admin_port}"
    state, process = start_follower(fleet.workers[0], url, options, folder, environment, run_id)
    ready = False
    try:
        wait_until_tied(state, folder.log, options.start_timeout_s)
        ready = True
        print(f"ready: it follows its leader\n  admin    {url}\n  log      {folder.log}", flush=True)
        return 0 if options.detach else _follow(state, folder)
    except EngineError:
        if not ready or process.wait(_EXIT_S) != 0:
            raise
    finally:
        if not (ready and options.detach):
            stop_run(folder)
    print("its leader was told to end, and so it ended", flush=True)
    return 0


def _refuse_second_run(folder: RunFolder) -> None:
    state = read_state(folder)
    if state is not None and state.is_running():
        raise ConfigError(f"a server of yours already runs on port {state.http_port}: stop it with `tandem stop`, or choose --http-port")
    stop_run(folder)


def _settings(worker: WorkerPlan, options: ServeOptions) -> WorkerSettings:
    """The settings as the worker will resolve them; contradictions show now, not in half a minute."""
    parameters = {"role": worker.role.value, "worker_index": str(worker.index)}
    settings = load_settings(parameters, {**os.environ, **options.environment})
    if settings.effective_role is Role.OMNI:
        if parse_connectors(settings.effective_connectors, Role.OMNI):
            raise ConfigError("--connector (DYN_CONNECTOR) is for KV blocks of engines, which a pipeline hands on by itself: leave it out")
        return settings
    if "kv_transfer_config" in worker.arguments:
        if settings.connector is not None:
            raise ConfigError("--connector and --kv-transfer-config exclude each other: remove one of them")
        return settings
    transfer_config(parse_connectors(settings.effective_connectors, settings.effective_role), settings.effective_role)
    return settings


def _ports(options: ServeOptions, settings: list[WorkerSettings]) -> list[Port]:
    ports = [
        Port(options.http_port, "HTTP", "--http-port"),
        Port(options.grpc_port, "gRPC", "--grpc-port"),
        Port(options.metrics_port, "metrics", "--metrics-port"),
    ]
    return ports + _worker_ports(options, settings)


def _worker_ports(options: ServeOptions, settings: list[WorkerSettings]) -> list[Port]:
    ports: list[Port] = []
    ranks = local_ranks(options.engine_arguments)
    for worker in settings:
        if worker.effective_admin_port > 0:
            ports.append(Port(worker.effective_admin_port, f"admin of worker {worker.worker_index}", "--admin-port"))
        if worker.publishes_kv_events:
            for port in ranks.ports(worker.kv_event_port, worker.worker_index):
                ports.append(Port(port, f"KV events of worker {worker.worker_index}", "--kv-event-port"))
                ports.append(Port(port + REPLAY_PORT_OFFSET, f"KV-event replay of worker {worker.worker_index}", "--kv-event-port"))
        if worker.effective_role is Role.PREFILL:
            side_ports = ranks.ports(worker.side_channel_port, worker.worker_index)
            ports += [Port(port, f"NIXL of worker {worker.worker_index}", "--side-channel-port") for port in side_ports]
    return ports


def _router_ports(options: ServeOptions) -> list[int]:
    """Admin ports of the router's instances; contradictions among its settings show now."""
    first = load_router_settings({}, {**os.environ, **options.environment}).router_admin_port
    return [first + i for i in range(options.counts.routers)] if first else []


def _discovery(options: ServeOptions, folder: RunFolder) -> dict[str, str]:
    """One discovery for all workers of the run, and how routers reach them; what the caller's environment says wins, also to say none."""
    ours = {"TANDEM_DISCOVERY": f"file:{quote(str(folder.discovery.absolute()))}", "TANDEM_GRPC_URL": f"127.0.0.1:{options.grpc_port}"}
    return {name: value for name, value in ours.items() if name not in os.environ}


def _embeddings(fleet: Fleet, folder: RunFolder) -> dict[str, str]:
    """Where encode workers of the run leave what they encode, unless the caller chose a folder that other hosts see, too."""
    encodes = any(worker.role is Role.ENCODE for worker in fleet.workers)
    return {EMBEDDING_FOLDER: str(folder.embeddings.absolute())} if encodes and not os.environ.get(EMBEDDING_FOLDER) else {}


def _environment(options: ServeOptions, fleet: Fleet, hardware: Hardware) -> dict[str, str]:
    """What the workers get besides the caller's own environment; also checks that the host is large enough."""
    environment = {**options.environment, "TANDEM_MODEL": str(options.model)}
    if not hardware.gpus:
        space = os.environ.get(KV_SPACE_VARIABLE) or str(KV_SPACE_GIB)
        environment[KV_SPACE_VARIABLE] = space
        check_memory(fleet, str(options.model), int(float(space) * GIB))
    check_shared_memory(fleet)
    return environment


def _start(options: ServeOptions, fleet: Fleet, settings: list[WorkerSettings], folder: RunFolder, environment: dict[str, str],
           router_ports: list[int], sidecars: tuple[Sidecar, ...]) -> RunState:
    install = find_triton()
    folder.path.mkdir(parents=True, exist_ok=True)
    write_repository(fleet, str(options.model), source_root() / "model_repository", folder.models)
    join_backends(install, source_root() / "backends" / "vllm", folder.backends)
    run_id = uuid.uuid4().hex
    environment = {**environment, RUN_ID_VARIABLE: run_id}
    ports = (options.http_port, options.grpc_port, options.metrics_port)
    with folder.log.open("wb") as log:
        server = subprocess.Popen(
            server_command(install, folder.models, folder.backends, ports, options.start_timeout_s),
            env=server_environment(install, environment),
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )
        start_sidecars(sidecars, server.pid, {**os.environ, **environment}, log)
    admin = {plan.name: f"http://{one.admin_host}:{one.effective_admin_port}" for plan, one in zip(fleet.workers, settings, strict=True)}
    state = RunState(run_id, server.pid, psutil.Process(server.pid).create_time(), *ports, models=fleet.model_names, admin_urls=admin,
                     router_urls=tuple(f"http://127.0.0.1:{port}" for port in router_ports))
    write_state(folder, state)
    print(f"starting {', '.join(fleet.model_names)} with {options.model} "
          f"(about a minute; log: {folder.log})", file=sys.stderr, flush=True)
    return state


def _follow(state: RunState, folder: RunFolder) -> int:
    """Copies the log to the terminal until the server ends or a signal asks to stop."""
    stopping: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        stopping.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    with folder.log.open("rb") as log:
        log.seek(0, os.SEEK_END)
        while not stopping and state.is_running():
            sys.stdout.write(log.read().decode(errors="replace"))
            sys.stdout.flush()
            time.sleep(_FOLLOW_POLL_S)
    if not stopping:
        what = f"the {FOLLOWER}" if FOLLOWER in state.admin_urls else "tritonserver"
        raise EngineError(f"{what} ended by itself; the end of {folder.log}:\n{tail(folder.log.read_text(errors='replace'))}")
    print("stopping ...", file=sys.stderr, flush=True)
    return 0


def _summary(state: RunState, folder: RunFolder) -> str:
    model = next(name for name in (ROUTER, "disagg", *state.models) if name in state.models)
    lines = [
        f"ready: {', '.join(state.models)}",
        f"  HTTP     http://localhost:{state.http_port}",
        f"  gRPC     localhost:{state.grpc_port}",
        f"  metrics  http://localhost:{state.metrics_port}/metrics",
        *(f"  admin    {url} ({name})" for name, url in state.admin_urls.items() if not url.endswith(":-1")),
        *(f"  admin    {url} (router)" for url in state.router_urls),
        f"  log      {folder.log}",
        "try:",
        f"  {_example(model, state)}",
    ]
    return "\n".join(lines)


def _example(model: str, state: RunState) -> str:
    if model == PIPELINE:
        return f'tandem generate --url localhost:{state.grpc_port} --model {model} --output answer "a cat on a roof"'
    return (f"curl -sN localhost:{state.http_port}/v2/models/{model}/generate_stream -d "
            "'{\"text_input\": \"<|im_start|>user\\nWhat is the capital of France?<|im_end|>\\n<|im_start|>assistant\\n\", "
            "\"stream\": true, \"temperature\": 0, \"max_tokens\": 32}'")
