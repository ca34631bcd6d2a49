# SPDX-License-Identifier: Apache-2.0
"""The scenarios, as data: which fleet, who is struck, how and when, under which load, and what clients may notice of it."""

from dataclasses import dataclass, field, replace
from enum import StrEnum


class Engine(StrEnum):
    """What generates tokens."""

    MOCK = "mock"
    """Mock engines as Triton models, each in a tritonserver of its own, and routers in theirs."""
    REAL = "real"
    """vLLM on the CPU with two random layers, each worker under `tandem serve`."""
    LIGHT = "light"
    """Mock processes, and the router in the test's own process: no tritonserver."""


class How(StrEnum):
    """What happens to the one who is struck."""

    NOTHING = "nothing"
    KILL = "SIGKILL"
    STOP = "SIGSTOP"
    TERM = "SIGTERM"
    CUT = "cut off"
    """Its packets are dropped, its connections stay."""
    ROLL = "upgrade"
    """Each replica in turn: drained, ended, started again."""
    FLOOD = "overflow"
    """Prompts of twice the model's context are sent beside the others."""


class Which(StrEnum):
    """Which process of a part."""

    SERVER = "server"
    STUB = "stub"
    ENGINE = "EngineCore"
    CONSOLIDATOR = "consolidator"


@dataclass(frozen=True)
class Plan:
    """A fleet. Its parts are named router-0, worker-0 (aggregated), prefill-0, decode-0, etcd, prometheus, planner."""

    engine: Engine
    routers: int = 1
    aggregated: int = 0
    prefill: int = 0
    decode: int = 0
    etcd: bool = False
    """Discovery in etcd instead of a folder."""
    planner: bool = False
    """A Prometheus and a planner that watches the aggregated workers."""
    tiers: bool = False
    """KV tiers, and with them a consolidator beside each worker."""
    links: bool = False
    """Workers are reached through links that can be cut: routers to mock workers, decode to prefill workers."""
    migration_limit: int = 3
    speedup: float = 0.2
    """Of mock engines; slow ones leave a small machine time for everything else."""


@dataclass(frozen=True)
class Fault:
    """What happens once so many requests have ended."""

    victim: str = ""
    how: How = How.NOTHING
    which: Which = Which.SERVER
    after_requests: int = 60
    lasts_s: float = 0.0
    """How long it stands still, is cut off, is flooded, or is away before a supervisor starts it again."""
    returns: bool = True
    """Off: nobody starts it again, and the fleet goes on without."""


@dataclass(frozen=True)
class Load:
    """Clients that ask one request after another, all different, streamed."""

    clients: int = 8
    requests: int = 220
    """At least."""
    isl: int = 96
    osl: int = 16
    pause_s: float = 0.1
    """Of each client between two requests."""
    retries: int = 0
    """How often a client asks again, elsewhere; 0: whatever the fleet doesn't mend itself is a failure."""
    patience_s: float = 20.0
    """Longest wait for a next token."""


@dataclass(frozen=True)
class Expectation:
    """What must hold."""

    success: float = 0.99
    """Share of requests that end whole."""
    recovery_s: float = 15.0
    """From the fault until the last client waited longer than usual."""
    whole_s: float = 120.0
    """From the fault until every part is back."""


@dataclass(frozen=True)
class Scenario:
    """One row of the report."""

    name: str
    plan: Plan
    fault: Fault
    load: Load = field(default_factory=Load)
    expect: Expectation = field(default_factory=Expectation)
    slow: bool = True


LIGHT = Plan(Engine.LIGHT, aggregated=2, speedup=2.0)
UNMOVED = replace(LIGHT, migration_limit=0)
AGGREGATED = Plan(Engine.MOCK, routers=2, aggregated=2)
DISAGGREGATED = Plan(Engine.LIGHT, prefill=2, decode=2)
LINKED = Plan(Engine.MOCK, aggregated=2, links=True)
KEPT = Plan(Engine.LIGHT, aggregated=2, etcd=True)
PLANNED = Plan(Engine.MOCK, aggregated=2, planner=True)
REAL_TIERED = Plan(Engine.REAL, aggregated=2, tiers=True)
REAL_PAIR = Plan(Engine.REAL, prefill=1, decode=1, links=True)
REAL_DISAGGREGATED = Plan(Engine.REAL, prefill=1, decode=2)

ELSEWHERE = Load(retries=3, patience_s=5.0)
"""Clients of several routers, as in Dynamo's tests: a router's own death no router can hide."""
FEW = Load(clients=4, requests=60, osl=24, pause_s=0.2)
"""What real engines on two cores can do."""
LONG = replace(FEW, isl=300)
"""Prompts of several blocks, so that a transfer matters."""
UNNOTICED = Expectation(success=1.0, recovery_s=0.0)
WHOLE = Expectation(success=1.0)
STALLED = Expectation(recovery_s=30.0)
TRIED = Expectation(recovery_s=120.0)
"""Until it is back, now and then a request is sent to a router that is gone, and then to another one."""
SLOWLY = Expectation(recovery_s=30.0, whole_s=300.0)
"""A real engine takes a minute to start on a core that is busy."""
SLOWLY_WHOLE = replace(SLOWLY, success=1.0)

SCENARIOS = (
    Scenario("a worker's process dies", LIGHT, Fault("worker-0", How.KILL, after_requests=80, returns=False),
             Load(clients=12, osl=8, pause_s=0.0), slow=False),
    Scenario("a worker's process dies, migration off", UNMOVED, Fault("worker-0", How.KILL), Load(clients=12, osl=32, pause_s=0.0),
             Expectation(success=0.9)),
    Scenario("nothing happens", AGGREGATED, Fault(), expect=UNNOTICED),
    Scenario("a worker's server dies", AGGREGATED, Fault("worker-0", How.KILL)),
    Scenario("a worker's stub dies", AGGREGATED, Fault("worker-0", How.KILL, Which.STUB)),
    Scenario("a worker's server stands still", AGGREGATED, Fault("worker-0", How.STOP, lasts_s=12.0), expect=STALLED),
    Scenario("a worker's server is told to end", AGGREGATED, Fault("worker-0", How.TERM)),
    Scenario("a router's server dies", AGGREGATED, Fault("router-0", How.KILL), ELSEWHERE, TRIED),
    Scenario("a router's server stands still", AGGREGATED, Fault("router-0", How.STOP, lasts_s=12.0), ELSEWHERE, STALLED),
    Scenario("a router's server is told to end", AGGREGATED, Fault("router-0", How.TERM), ELSEWHERE, TRIED),
    Scenario("workers are upgraded", AGGREGATED, Fault("worker", How.ROLL), expect=WHOLE),
    Scenario("routers are upgraded", AGGREGATED, Fault("router", How.ROLL), ELSEWHERE, WHOLE),
    Scenario("prompts too long", AGGREGATED, Fault("", How.FLOOD, lasts_s=5.0), expect=WHOLE),
    Scenario("a prefill worker dies", DISAGGREGATED, Fault("prefill-0", How.KILL)),
    Scenario("a prefill worker stands still", DISAGGREGATED, Fault("prefill-0", How.STOP, lasts_s=12.0), expect=STALLED),
    Scenario("a decode worker dies", DISAGGREGATED, Fault("decode-0", How.KILL)),
    Scenario("a decode worker stands still", DISAGGREGATED, Fault("decode-0", How.STOP, lasts_s=12.0), expect=STALLED),
    Scenario("prefill workers are upgraded", DISAGGREGATED, Fault("prefill", How.ROLL), expect=WHOLE),
    Scenario("decode workers are upgraded", DISAGGREGATED, Fault("decode", How.ROLL), expect=WHOLE),
    Scenario("a worker is cut off from the router", LINKED, Fault("worker-0", How.CUT, lasts_s=15.0), expect=STALLED),
    Scenario("etcd dies", KEPT, Fault("etcd", How.KILL, lasts_s=15.0), expect=WHOLE),
    Scenario("workers' processes are upgraded", KEPT, Fault("worker", How.ROLL), expect=WHOLE),
    Scenario("etcd stands still", KEPT, Fault("etcd", How.STOP, lasts_s=15.0), expect=WHOLE),
    Scenario("Prometheus dies", PLANNED, Fault("prometheus", How.KILL, lasts_s=10.0), expect=WHOLE),
    Scenario("the planner dies", PLANNED, Fault("planner", How.KILL, lasts_s=10.0), expect=WHOLE),
    Scenario("a consolidator dies", REAL_TIERED, Fault("worker-0", How.KILL, Which.CONSOLIDATOR, 12), FEW, WHOLE),
    Scenario("prompts too long for a real engine", REAL_TIERED, Fault("", How.FLOOD, after_requests=12, lasts_s=5.0), FEW, WHOLE),
    Scenario("an EngineCore dies", REAL_TIERED, Fault("worker-0", How.KILL, Which.ENGINE, 12), FEW, SLOWLY),
    Scenario("real workers are upgraded", REAL_TIERED, Fault("worker", How.ROLL, after_requests=12), FEW, SLOWLY_WHOLE),
    Scenario("prefill and decode are cut apart", REAL_PAIR, Fault("prefill-0", How.CUT, after_requests=12, lasts_s=40.0), LONG,
             Expectation(recovery_s=90.0, whole_s=300.0)),
    Scenario("a decode EngineCore dies", REAL_DISAGGREGATED, Fault("decode-0", How.KILL, Which.ENGINE, 12), LONG, SLOWLY),
    Scenario("a prefill EngineCore dies", REAL_DISAGGREGATED, Fault("prefill-0", How.KILL, Which.ENGINE, 12), LONG, SLOWLY),
)
