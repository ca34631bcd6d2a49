# SPDX-License-Identifier: Apache-2.0
"""From a plan to a running fleet: parts with their ports and settings, what whole means, and how clients reach it."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etcds import Etcd
from fault_tolerance.network import KvLink
from fault_tolerance.parts import START_S, Kept, MockProcessPart, MockWorkerPart, Part, RealPart, RouterPart, go_on, python, stop
from fault_tolerance.scenarios import Engine, Plan, Which
from mock_models import write_mock_models
from prometheuses import RealPrometheus
from routers import LocalRouter, router
from servers import free_ports, get_json, wait_for
from tandem_cli.serve.embedded_model import embedded_model
from tandem_cli.serve.fleet import Fleet as Served
from tandem_cli.serve.layout import source_root
from tandem_cli.serve.repository import write_repository

MOCK_CONTEXT, REAL_CONTEXT = 512, 1024
"""Tokens that a model takes at most."""
REAL_START_S = 480.0
"""Of several engines that share a busy core."""
_PORTS = 20
"""Of each part."""
PATIENCE = {Engine.MOCK: (3.0, 5.0, 5.0), Engine.LIGHT: (3.0, 5.0, 5.0), Engine.REAL: (5.0, 15.0, 10.0)}
"""Seconds that a router waits here for a next token, for the first one, and for a prefill or a transfer; its defaults suit long prompts."""
_PLANNER = ("--mode", "agg", "--adjustment-interval", "3", "--load-interval", "3", "--max-gpu-budget", "2", "--scale-down-window", "2",
            "--decode-scale-up-kv-rate", "90", "--decode-scale-down-kv-rate", "5", "--prefill-scale-up-queue-tokens", "1e9",
            "--prefill-scale-down-queue-tokens", "1e9", "--start-delay-s", "1", "--connector", "triton", "--triton-aggregated", "mock*")
_PLANNED_BLOCKS = "120"
"""So few that the load of a scenario is far above the planner's limit for one worker less."""


@dataclass
class Fleet:
    """Running parts. Resource handling: `end` ends them all."""

    plan: Plan
    folder: Path
    parts: dict[str, Part] = field(default_factory=dict)
    expected: set[tuple[str, str]] = field(default_factory=set)
    """gRPC address and Triton model of every worker that should be in placement."""
    addresses: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """The same by part."""
    links: dict[str, Part] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    """Workers, by their ids in discovery, that ended: their records stay until their leases do."""
    out: set[str] = field(default_factory=set)
    """Routers that get nothing more from their load balancer."""
    size: int = 0
    """Parts at first."""
    local: LocalRouter | None = None
    kv_link: KvLink | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def routers(self) -> list[RouterPart]:
        """Router servers."""
        return [part for part in self.parts.values() if isinstance(part, RouterPart)]

    @property
    def urls(self) -> list[str]:
        """Of the routers that clients are sent to."""
        return [part.url for part in self.routers if part.name not in self.out]

    @property
    def context(self) -> int:
        """Tokens that the model takes at most."""
        return REAL_CONTEXT if self.plan.engine is Engine.REAL else MOCK_CONTEXT

    def replicas(self, role: str) -> list[Part]:
        """Parts of one kind."""
        return [part for name, part in self.parts.items() if name.startswith(f"{role}-")]

    def workers(self) -> list[list[dict[str, Any]]]:
        """What each router knows of the workers."""
        if self.local is not None:
            return [list(get_json(f"{self.local.admin}/fleet")["workers"])]
        return [list(part.fleet()["workers"]) if part.ready() else [] for part in self.routers]

    def whole(self) -> bool:
        """Whether every part is there, and known to all who need it."""
        return all(self._places_all(known) for known in self.workers()) and all(map(_serves, self.parts.values()))

    def reusable(self) -> bool:
        """Whether it is as it was at first."""
        return self.whole() and len(self.parts) == self.size

    def _places_all(self, known: Iterable[dict[str, Any]]) -> bool:
        return self.expected <= {(one["grpc_url"], one["triton_model"]) for one in known if one["placed"] and one["id"] not in self.dead}

    def mourn(self, part: Part) -> None:
        """The workers of a part that ended are not waited for any more: others will come in their place."""
        urls = {url for url, _ in self.addresses.get(part.name, ())}
        self.dead |= {one["id"] for known in self.workers() for one in known if one["grpc_url"] in urls}

    def forget(self, part: Part) -> None:
        """The fleet is whole without it."""
        self.parts.pop(part.name).end()
        self.expected -= set(self.addresses.pop(part.name))

    def cut(self, name: str) -> None:
        """Between the part and those who need it nothing arrives any more."""
        if self.kv_link is not None:
            self.kv_link.cut()
        else:
            stop(self.links[name].find(Which.SERVER))

    def mend(self, name: str) -> None:
        """Ends `cut`."""
        if self.kv_link is not None:
            self.kv_link.mend()
        else:
            go_on(self.links[name].find(Which.SERVER))

    def add(self, part: Part, *workers: tuple[str, str]) -> None:
        """Starts it."""
        self.parts[part.name] = part
        self.addresses[part.name] = list(workers)
        self.expected |= set(workers)
        part.start()

    def end(self) -> None:
        """All at once, by force: drains are scenarios of their own."""
        for part in (*self.parts.values(), *self.links.values()):
            part.end()
        self.stack.close()

    def log(self) -> str:
        """The ends of all logs."""
        found = [*self.folder.glob("*/log"), *self.folder.glob("*/run/*.log")]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-2000:]}" for path in found)


def _serves(part: Part) -> bool:
    """Whether a part answers as it should."""
    if isinstance(part, Kept):
        return part.process is not None and bool(part.thing.answers())
    if part.name == "planner":
        return _planner_sees_all(part)
    if isinstance(part, RealPart) and "kvbm" in part.command:
        return any("tandem_kvbm.consolidator" in one.cmdline() for one in part.processes())
    return part.process is not None and part.process.poll() is None


def _planner_sees_all(part: Part) -> bool:
    port = part.command[part.command.index("--admin-port") + 1]
    try:
        health = get_json(f"http://127.0.0.1:{port}/health")
    except OSError:
        return False
    # Before the load there are no requests to know of.
    missing = [what for what in health.get("missing", ["everything"]) if "no metrics of requests" not in what]
    return bool(health.get("status") == "ready" and not missing)


@contextlib.contextmanager
def running(plan: Plan, folder: Path, model: Path | None) -> Iterator[Fleet]:
    """A whole fleet; `model` is for real engines. Whatever is left of it is killed at the end."""
    fleet = Fleet(plan, folder)
    try:
        _build(fleet, model)
        fleet.size = len(fleet.parts)
        wait_for(fleet.whole, REAL_START_S if plan.engine is Engine.REAL else START_S, f"the fleet {plan}")
        yield fleet
    except AssertionError as exc:
        raise AssertionError(f"{exc}\n{fleet.log()}") from exc
    finally:
        fleet.end()


def _build(fleet: Fleet, model: Path | None) -> None:
    plan, folder = fleet.plan, fleet.folder
    first = free_ports(10 * _PORTS)
    discovery = f"file:{folder / 'discovery'}"
    if plan.etcd:
        (folder / "etcd").mkdir()
        etcd = Etcd(folder / "etcd", first + 9 * _PORTS)
        fleet.add(Kept("etcd", folder / "etcd", (), thing=etcd))
        discovery = etcd.url
    ports = iter(range(first, first + 9 * _PORTS, _PORTS))
    if plan.engine is Engine.LIGHT:
        _build_light(fleet, discovery, ports)
    elif plan.engine is Engine.REAL:
        assert model is not None
        _add_real(fleet, discovery, ports, model)
    elif plan.planner:
        _add_planned(fleet, discovery, ports)
    else:
        _add_mocks(fleet, discovery, ports)
    for number in range(plan.routers if fleet.local is None else 0):
        fleet.add(_router(fleet, number, next(ports), discovery, "mock" if model is None else str(model)))
    if plan.planner:
        _add_planner(fleet, discovery, next(ports))


def _build_light(fleet: Fleet, discovery: str, ports: Iterator[int]) -> None:
    for role, count in (("aggregated", fleet.plan.aggregated), ("prefill", fleet.plan.prefill), ("decode", fleet.plan.decode)):
        for number in range(count):
            _add_process(fleet, f"{'worker' if role == 'aggregated' else role}-{number}", role, discovery, next(ports))
    fleet.local = fleet.stack.enter_context(router(discovery, len(fleet.expected), embedded_model(), **_routing(fleet.plan)))


def _routing(plan: Plan) -> dict[str, str]:
    token, first, prefill = PATIENCE[plan.engine]
    return {"DYN_MIGRATION_LIMIT": str(plan.migration_limit), "TANDEM_ROUTER_NEXT_TOKEN_TIMEOUT_S": f"{token:g}",
            "TANDEM_ROUTER_FIRST_TOKEN_TIMEOUT_S": f"{first:g}", "TANDEM_ROUTER_PREFILL_TIMEOUT_S": f"{prefill:g}",
            "TANDEM_ROUTER_TRANSFER_TIMEOUT_S": f"{prefill:g}",
            "DYN_ROUTER_REPLICA_SYNC": str(plan.routers > 1).lower(), "TANDEM_SERVER_EXIT_TIMEOUT_S": "5"}


def _engine(plan: Plan) -> tuple[str, ...]:
    return "--speedup", f"{plan.speedup:g}", "--max-model-len", str(MOCK_CONTEXT)


def _router(fleet: Fleet, number: int, first: int, discovery: str, model: str) -> RouterPart:
    variables = {**_routing(fleet.plan), "TANDEM_DISCOVERY": discovery, "TANDEM_ROUTER_TOKENIZER": str(embedded_model()),
                 "TANDEM_ROUTER_ADMIN_PORT": str(first + 3)}
    write = functools.partial(write_repository, Served((), (), routers=1), model, source_root() / "model_repository")
    return RouterPart(f"router-{number}", fleet.folder / f"router-{number}", (), variables, model="router", first_port=first, write=write,
                      url=f"127.0.0.1:{first + 1}", admin=f"http://127.0.0.1:{first + 3}")


def _add_mocks(fleet: Fleet, discovery: str, ports: Iterator[int]) -> None:
    for number in range(fleet.plan.aggregated):
        _add_mock_worker(fleet, f"worker-{number}", discovery, next(ports))


def _add_mock_worker(fleet: Fleet, name: str, discovery: str, first: int) -> None:
    reached = first + 1
    if fleet.plan.links:
        reached = first + 5
        fleet.links[name] = Part(f"link-{name}", fleet.folder / f"link-{name}",
                                 python(str(Path(__file__).with_name("link.py")), str(reached), str(first + 1)))
        fleet.links[name].start()
    arguments = f"{' '.join(_engine(fleet.plan))} --discovery {discovery} --admin-port {first + 3}"
    write = functools.partial(write_mock_models, arguments_of={"mock": arguments})
    part = MockWorkerPart(name, fleet.folder / name, (), {"TANDEM_GRPC_URL": f"127.0.0.1:{reached}"}, model="mock", first_port=first,
                          write=write, admin=f"http://127.0.0.1:{first + 3}")
    fleet.add(part, (f"127.0.0.1:{reached}", "mock"))


def _add_process(fleet: Fleet, name: str, role: str, discovery: str, first: int) -> None:
    command = python("-m", "tandem_worker.mock", "--role", role, "--name", role, "--discovery", discovery, "--grpc-port", str(first + 1),
                     "--admin-port", str(first + 3), *_engine(fleet.plan))
    part = MockProcessPart(name, fleet.folder / name, command, admin=f"http://127.0.0.1:{first + 3}")
    fleet.add(part, (f"127.0.0.1:{first + 1}", f"{role}_0"))


def _add_planned(fleet: Fleet, discovery: str, ports: Iterator[int]) -> None:
    """One server with all workers as models, which the planner loads and unloads."""
    first, names = next(ports), [f"mock_{number}" for number in range(fleet.plan.aggregated)]
    engine = " ".join(_engine(fleet.plan))
    arguments = {name: f"{engine} --blocks {_PLANNED_BLOCKS} --discovery {discovery} --admin-port {first + 3 + number}"
                 for number, name in enumerate(names)}
    part = MockWorkerPart("worker-0", fleet.folder / "worker-0", (), {"TANDEM_GRPC_URL": f"127.0.0.1:{first + 1}"}, model="*",
                          first_port=first, write=functools.partial(write_mock_models, arguments_of=arguments))
    fleet.add(part, *((f"127.0.0.1:{first + 1}", name) for name in names))


def _add_planner(fleet: Fleet, discovery: str, first: int) -> None:
    [front], [worker] = fleet.routers, fleet.replicas("worker")
    assert isinstance(worker, MockWorkerPart)
    targets = (front.admin.removeprefix("http://"), *(f"127.0.0.1:{worker.first_port + 3 + n}" for n in range(fleet.plan.aggregated)))
    prometheus = RealPrometheus(fleet.folder / "prometheus", targets, port=first)
    fleet.add(Kept("prometheus", fleet.folder / "prometheus", (), thing=prometheus))
    # An idle fleet, as it is until the load begins, would be made smaller than the scenario's.
    least = ("--min-endpoint", str(fleet.plan.aggregated))
    command = python("-m", "tandem_planner", *_PLANNER, *least, "--triton-url", f"http://127.0.0.1:{worker.first_port}",
                     "--prometheus-endpoint", prometheus.url, "--admin-port", str(first + 1), "--state",
                     str(fleet.folder / "planner.state"))
    fleet.add(Part("planner", fleet.folder / "planner", command, {"TANDEM_DISCOVERY": discovery}))


def _add_real(fleet: Fleet, discovery: str, ports: Iterator[int], model: Path) -> None:
    plan = fleet.plan
    if plan.links:
        fleet.kv_link = fleet.stack.enter_context(KvLink.laid())
    for role, count in (("worker", plan.aggregated), ("prefill", plan.prefill), ("decode", plan.decode)):
        for number in range(count):
            _add_engine(fleet, f"{role}-{number}", role, discovery, next(ports), model)


def _add_engine(fleet: Fleet, name: str, role: str, discovery: str, first: int, model: Path) -> None:
    link = fleet.kv_link
    apart = link is not None and role == "prefill"
    host = link.far_address if link is not None and apart else "127.0.0.1"
    flags = ("--mode", "agg") if role == "worker" else (f"--is-{role}-worker",)
    tiers = ("--connector", "kvbm", "--cpu-cache-gb", "0.05") if fleet.plan.tiers else ()
    command = python("-m", "tandem_cli.main", "serve", *flags, "--routers", "0", "--model", str(model),
                     "--max-model-len", str(REAL_CONTEXT), "--max-num-seqs", "8", "--dtype", "float32", *tiers,
                     "--http-port", str(first), "--grpc-port", str(first + 1), "--metrics-port", str(first + 2))
    variables = {"TANDEM_DISCOVERY": discovery, "TANDEM_RUN_DIR": str(fleet.folder / name / "run"), "DYN_SYSTEM_PORT": str(first + 3),
                 "DYN_VLLM_KV_EVENT_PORT": str(first + 8), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(first + 12),
                 "TANDEM_CONSOLIDATOR_PORT": str(first + 18), "TANDEM_CONSOLIDATOR_ADMIN_PORT": "0", "TANDEM_SERVER_EXIT_TIMEOUT_S": "5",
                 "TANDEM_GRPC_URL": f"{host}:{first + 1}", "DYN_SYSTEM_HOST": host,
                 **(link.variables(far=apart) if link is not None else {})}
    served, inside = "vllm" if role == "worker" else role, link.inside if link is not None and apart else ()
    part = RealPart(name, fleet.folder / name, (*inside, *command), variables, first_port=first, model=served)
    fleet.add(part, (f"{host}:{first + 1}", served))
