# SPDX-License-Identifier: Apache-2.0
"""Settings of a consolidator, and where its streams are. The one module of the consolidator that reads the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem_kvbm.consolidator.plan import ALL_RANKS, LaneLimits, Plan, Publisher
from tandem_kvbm.consolidator.supervisor import WATCHED_VARIABLE
from tandem_protocol.errors import ConfigError
from tandem_protocol.settings import parse_bool, parse_float, parse_int, resolve, setting

HIGHEST_PORT = 65535
PUBLISH_OFFSET = 1000
"""From `DYN_KVBM_LEADER_ZMQ_PUB_PORT` to the consolidated stream; and from that to its replay socket."""
_port = parse_int(0, HIGHEST_PORT)


def _publishers(text: str) -> tuple[Publisher, ...]:
    """`name,endpoint[,replay endpoint[,rank]]`, several separated by blanks; without a rank they are every rank's."""
    return tuple(_publisher(word.split(",")) for word in text.split())


def _publisher(fields: list[str]) -> Publisher:
    if not 2 <= len(fields) <= 4 or not fields[0] or "://" not in fields[1]:
        raise ValueError("expected name,endpoint[,replay endpoint[,rank]]")
    return Publisher(fields[0], fields[1], fields[2] if len(fields) > 2 else "", int(fields[3]) if len(fields) > 3 else ALL_RANKS)


@dataclass(frozen=True)
class ConsolidatorSettings:
    """Settings of one consolidator, resolved; units are in the names or in the specs."""

    enabled: bool = setting(
        env="DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR", default=True, parse=parse_bool, flag=False,
        help="Whether `tandem serve` puts a consolidator beside a worker with the connector kvbm; without, routers hear the engine itself.",
    )
    leader_pub_port: int = setting(
        env="DYN_KVBM_LEADER_ZMQ_PUB_PORT", default=56001, parse=parse_int(1024, HIGHEST_PORT), unit="port", flag=False,
        help="The consolidated stream is published 1000 ports above it, 57001, plus the worker's index; a port above 65535 is an error.",
    )
    port: int = setting(
        env="TANDEM_CONSOLIDATOR_PORT", default=0, parse=_port, unit="port", flag=False,
        help="First port of consolidated streams, plus worker index, in place of 57001; 0: that one. Replay answers 1000 above.",
    )
    worker_index: int = setting(
        env="TANDEM_CONSOLIDATOR_WORKER_INDEX", default=0, parse=parse_int(0, 999), flag=False,
        help="Number of the worker on its host; derived ports are offset by it so that consolidators never collide.",
    )
    engine: str = setting(
        env="TANDEM_CONSOLIDATOR_ENGINE", default="tcp://127.0.0.1:20080", parse=str, flag=False,
        help="Where the engine's rank 0 publishes; rank n publishes n ports above, as vLLM has it.",
    )
    engine_replay: str = setting(
        env="TANDEM_CONSOLIDATOR_ENGINE_REPLAY", default="tcp://127.0.0.1:21080", parse=str, flag=False,
        help="Where the engine's rank 0 answers replays; empty if it doesn't, and then a gap costs the tiers' history.",
    )
    ranks: int = setting(
        env="TANDEM_CONSOLIDATOR_RANKS", default=1, parse=parse_int(1, 64), flag=False,
        help="Data-parallel ranks of the engine; their batches go into one stream, each marked with its rank.",
    )
    publishers: tuple[Publisher, ...] = setting(
        env="TANDEM_CONSOLIDATOR_PUBLISHERS", default=(), parse=_publishers, flag=False,
        help="Further publishers of tiers, separated by blanks: name,endpoint[,replay endpoint[,rank]]; without a rank every rank's.",
    )
    host: str = setting(
        env="TANDEM_CONSOLIDATOR_HOST", default="0.0.0.0", parse=str, flag=False,  # noqa: S104 - routers are on other hosts
        help="Address to publish at: all, since routers may be on other hosts. Events hold token ids, so keep it off the internet.",
    )
    admin_host: str = setting(
        env="TANDEM_CONSOLIDATOR_ADMIN_HOST", default="127.0.0.1", parse=str, flag=False, help="Address of the admin server.",
    )
    admin_port: int = setting(
        env="TANDEM_CONSOLIDATOR_ADMIN_PORT", default=8481, parse=_port, unit="port", flag=False,
        help="Port of /live, /health and /metrics, plus the worker's index; 0 for any free one.",
    )
    buffer_steps: int = setting(
        env="TANDEM_CONSOLIDATOR_BUFFER_STEPS", default=10_000, parse=parse_int(100, 1_000_000), unit="frames", flag=False,
        help="Frames kept for replays, as many as vLLM keeps; who asks for older ones gets a dump of the whole state.",
    )
    max_blocks: int = setting(
        env="TANDEM_CONSOLIDATOR_MAX_BLOCKS", default=1 << 22, parse=parse_int(1024, 1 << 31), unit="blocks", flag=False,
        help="Blocks followed per rank, over all tiers, about 200 bytes each with 16 tokens; those beyond are counted and not published.",
    )
    max_orphans: int = setting(
        env="TANDEM_CONSOLIDATOR_MAX_ORPHANS", default=1 << 16, parse=parse_int(1, 1 << 24), unit="blocks", flag=False,
        help="Blocks per rank that wait for their parent; beyond, the oldest is given up.",
    )
    orphan_s: float = setting(
        env="TANDEM_CONSOLIDATOR_ORPHAN_S", default=30.0, parse=parse_float(0.1, 3600), unit="s", flag=False,
        help="How long a block may wait for its parent: offload tiers announce children first, but within moments.",
    )
    state: str = setting(
        env="TANDEM_CONSOLIDATOR_STATE", default="", parse=str, flag=False,
        help="File that keeps the state over restarts; empty for none, and then a restart knows what the engine's replay buffer holds.",
    )
    save_s: float = setting(
        env="TANDEM_CONSOLIDATOR_SAVE_S", default=30.0, parse=parse_float(0.5, 86_400), unit="s", flag=False,
        help="How often the state is written if it changed; a crash replays from there, so it should be well below the buffer's time.",
    )
    watched_pid: int = setting(
        env=WATCHED_VARIABLE, default=0, parse=parse_int(0, 1 << 22), flag=False,
        help="With the end of this process it ends, too; 0 for none. `tandem serve` sets it, so that no consolidator outlives its run.",
    )

    def __post_init__(self) -> None:
        names = [publisher.name for publisher in self.all_publishers]
        if len(set(names)) != len(names):
            raise ConfigError(f"publishers {', '.join(names)}: give each a name of its own, not engine0, engine1 ...")
        wrong = [publisher.name for publisher in self.publishers if not ALL_RANKS <= publisher.rank < self.ranks]
        if wrong:
            raise ConfigError(f"publisher {wrong[0]} is of a rank that the engine doesn't have: TANDEM_CONSOLIDATOR_RANKS is {self.ranks}")
        if max(self.published_port + PUBLISH_OFFSET, self.effective_admin_port) > HIGHEST_PORT:
            raise ConfigError(f"the consolidated KV events would need port {self.published_port + PUBLISH_OFFSET}, which is beyond "
                              f"{HIGHEST_PORT}: lower DYN_KVBM_LEADER_ZMQ_PUB_PORT or TANDEM_CONSOLIDATOR_PORT")

    @property
    def published_port(self) -> int:
        """Port of the consolidated stream; its replay socket is `PUBLISH_OFFSET` above."""
        return (self.port or self.leader_pub_port + PUBLISH_OFFSET) + self.worker_index

    @property
    def effective_admin_port(self) -> int:
        """The admin port of this consolidator; 0 (any) is not offset."""
        return self.admin_port + self.worker_index if self.admin_port else 0

    @property
    def all_publishers(self) -> tuple[Publisher, ...]:
        """The engine's ranks and the further ones."""
        ranks = range(self.ranks)
        own = (Publisher(f"engine{rank}", offset(self.engine, rank), offset(self.engine_replay, rank), rank) for rank in ranks)
        return (*own, *self.publishers)

    def plan(self) -> Plan:
        """What the settings come to."""
        limits = LaneLimits(max_blocks=self.max_blocks, max_orphans=self.max_orphans, orphan_s=self.orphan_s)
        port = self.published_port
        return Plan(
            publishers=self.all_publishers, endpoint=f"tcp://{self.host}:{port}",
            replay_endpoint=f"tcp://{self.host}:{port + PUBLISH_OFFSET}", buffer_steps=self.buffer_steps, lane=limits,
            state=Path(self.state) if self.state else None, save_s=self.save_s,
        )


def offset(endpoint: str, rank: int) -> str:
    """The endpoint of a rank, as vLLM derives it from that of rank 0."""
    if not endpoint.startswith("tcp://") or rank == 0:
        return endpoint
    address, _, port = endpoint.rpartition(":")
    return f"{address}:{int(port) + rank}"


def wanted(settings: ConsolidatorSettings, connectors: tuple[str, ...], *, prefix_caching: bool, publishes: bool) -> bool:
    """Whether a worker gets a consolidator: with kvbm's tiers, prefix caching (else no events), and a router's interest in its events."""
    return settings.enabled and "kvbm" in connectors and prefix_caching and publishes


def load_settings(parameters: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None) -> ConsolidatorSettings:
    """From the environment. Raises ConfigError."""
    return resolve(ConsolidatorSettings, parameters or {}, os.environ if environ is None else environ)
