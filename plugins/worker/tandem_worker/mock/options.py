# SPDX-License-Identifier: Apache-2.0
"""The command line of the mock process."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_worker.mock.settings import EngineSettings
from tandem_worker.mock.timing import StepTiming, load_profile


@dataclass(frozen=True)
class MockOptions:
    """One process of mock workers that are all alike."""

    engine: EngineSettings
    timing: StepTiming
    workers: int = 1
    name: str = "mock"
    """Model names are `<name>_0`, `<name>_1`, ..."""
    model: str = "mock"
    """The model that all of them claim to serve."""
    host: str = "127.0.0.1"
    grpc_port: int = 0
    admin_port: int = 0
    event_port: int = 0
    """Of the first worker's PUB socket, its replay socket is the next, and so on; 0 for any free ones."""
    events: bool = True
    discovery: str = ""
    response_rate: int = 0
    """Responses per second over all streams of a worker, beyond which tokens share responses as in a real one; 0 for no bound."""
    die_after: int = 0
    die_worker: int = 0
    exact_name: bool = False
    """The one worker's model name is `name` itself, as Triton has it."""


def parse(argv: Sequence[str] | None = None) -> MockOptions:
    """Reads the command line. Raises ConfigError for settings that can't be."""
    given = _parser().parse_args(argv)
    if given.workers < 1 or given.response_rate < 0:
        raise ConfigError("--workers must be at least 1 and --response-rate at least 0")
    engine = EngineSettings(
        role=Role(given.role), block_size=given.block_size, total_blocks=given.blocks, max_num_seqs=given.max_num_seqs,
        max_num_batched_tokens=given.max_num_batched_tokens, max_model_len=given.max_model_len, watermark=given.watermark,
        transfer_bytes_per_s=given.transfer_gbps * 1e9 / 8, vocabulary=given.vocabulary, speculation=given.speculation,
    )
    timing = load_profile(given.profile, given.speedup) if given.profile else StepTiming(speedup=given.speedup)
    return MockOptions(engine, timing, given.workers, given.name, given.model, given.host, given.grpc_port, given.admin_port,
                       given.event_port, given.events, given.discovery, given.response_rate, given.die_after, given.die_worker)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tandem_worker.mock", description="Mock vLLM workers behind one KServe gRPC port.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    engine, process, faults = (parser.add_argument_group(title) for title in ("engine", "process", "faults"))
    default = EngineSettings()
    engine.add_argument("--role", choices=[role.value for role in Role if role is not Role.OMNI], default=Role.AGGREGATED.value)
    engine.add_argument("--speedup", type=float, default=1.0, help="divides all times")
    engine.add_argument("--profile", type=Path, help="measured steps (JSON) in place of the made-up timing")
    engine.add_argument("--block-size", type=int, default=default.block_size, help="tokens per KV block")
    engine.add_argument("--blocks", type=int, default=default.total_blocks, help="KV blocks")
    engine.add_argument("--max-num-seqs", type=int, default=default.max_num_seqs)
    engine.add_argument("--max-num-batched-tokens", type=int, default=default.max_num_batched_tokens)
    engine.add_argument("--max-model-len", type=int, default=default.max_model_len)
    engine.add_argument("--watermark", type=float, default=default.watermark, help="share of the blocks kept free at admission")
    engine.add_argument("--vocabulary", type=int, default=default.vocabulary, help="token ids are below this")
    engine.add_argument("--transfer-gbps", type=float, default=default.transfer_bytes_per_s * 8 / 1e9, help="of KV pulls, Gbit/s")
    engine.add_argument("--speculation", default=default.speculation, help="how it says that it speculates; only alike ones are paired")
    process.add_argument("--workers", type=int, default=1)
    process.add_argument("--name", default="mock", help="model names are NAME_0, NAME_1, ...")
    process.add_argument("--model", default="mock", help="the model that all of them claim to serve")
    process.add_argument("--host", default="127.0.0.1", help="address of all ports")
    process.add_argument("--grpc-port", type=int, default=0, help="0 for any")
    process.add_argument("--admin-port", type=int, default=0, help="0 for any")
    process.add_argument("--event-port", type=int, default=0, help="first of two per worker (PUB, replay); 0 for any")
    process.add_argument("--no-events", dest="events", action="store_false", help="publish no KV events")
    process.add_argument("--discovery", default="", help="where to register: file:/folder, etcd://host:port, kubernetes; nowhere if empty")
    process.add_argument("--response-rate", type=int, default=0, help="responses/s, as TANDEM_RESPONSE_RATE of a worker; 0 for no bound")
    faults.add_argument("--die-after", type=int, default=0, help="a worker dies once it has generated so many tokens; 0 for never")
    faults.add_argument("--die-worker", type=int, default=0, help="which worker that is")
    return parser
