# SPDX-License-Identifier: Apache-2.0
"""A router's settings, from the environment and the model's config parameters.

This is the one module of the router that reads the environment. Names and defaults are Dynamo's where it has the
setting; where a default differs, the reason stands in the help.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from tandem_protocol.discovery import check_url
from tandem_protocol.errors import ConfigError
from tandem_protocol.settings import parse_bool, parse_float, parse_int, resolve, setting

T = TypeVar("T")
DAY_S = 86_400
PREFILL_LOAD_SCALE = 12.0


class RouterMode(StrEnum):
    """How a worker is chosen among the candidates."""

    KV = "kv"
    """Least cost: prefill work left after prefix hits, plus decode load."""
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    POWER_OF_TWO = "power-of-two"
    """The less loaded of two workers drawn at random."""
    LEAST_LOADED = "least-loaded"
    DIRECT = "direct"
    """Every request names its worker."""


def _or_unset(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    def parse_or_unset(text: str) -> T | None:
        return None if text.strip().lower() in {"none", "unset"} else parse(text)

    return parse_or_unset


def _discovery_url(text: str) -> str:
    return check_url(text.strip())


@dataclass(frozen=True)
class RouterSettings:
    """Settings of one router, resolved; units are in the names or in the specs."""

    router_mode: RouterMode = setting(  # noqa: RUF009 - makes a dataclass field, like dataclasses.field itself
        env="DYN_ROUTER_MODE", default=RouterMode.KV, parse=RouterMode,
        help="kv, round-robin, random, power-of-two, least-loaded or direct. kv (Dynamo: round-robin): reusing prefixes is why one routes.",
    )
    kv_cache_block_size: int = setting(
        env="DYN_KV_CACHE_BLOCK_SIZE", default=0, parse=parse_int(0, 65_536), unit="tokens",
        help="Block size that every worker must have; 0 takes the first worker's. Workers of another size are refused, never guessed at.",
    )

    kv_overlap_score_weight: float | None = setting(
        env="DYN_KV_OVERLAP_SCORE_WEIGHT", default=None, parse=_or_unset(parse_float(0, 1000)),
        help="Dynamo's older name of the next setting, used in its place if set; 0 ignores prefixes and reads no events.",
    )
    router_prefill_load_scale: float = setting(
        env="DYN_ROUTER_PREFILL_LOAD_SCALE", default=PREFILL_LOAD_SCALE, parse=parse_float(0, 1000),
        help="Cost of computing a block against holding one. 12 (Dynamo: 1): more reuse, lower TTFT in `bench route-trace`, same spread.",
    )
    router_kv_overlap_score_credit: float = setting(
        env="DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT", default=2.5, parse=parse_float(0, 10),
        help="Worth of a hit on the device in blocks of prefill. 1 is the work saved; 2.5 also keeps conversations together (Dynamo: 1).",
    )
    router_kv_overlap_score_credit_decay: float = setting(
        env="DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY", default=0.0, parse=parse_float(0, 1000),
        help="How fast that credit falls with a worker's backlog beyond the shortest; 0 since the backlog is in the cost already.",
    )
    router_host_cache_hit_weight: float = setting(
        env="DYN_ROUTER_HOST_CACHE_HIT_WEIGHT", default=0.75, parse=parse_float(0, 1),
        help="Credit of a block in host memory, below 1 since it must be loaded to the device first.",
    )
    router_disk_cache_hit_weight: float = setting(
        env="DYN_ROUTER_DISK_CACHE_HIT_WEIGHT", default=0.25, parse=parse_float(0, 1),
        help="Credit of a block in storage, where loading may take nearly as long as computing.",
    )
    router_decode_active_request_weight: float = setting(
        env="DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT", default=0.0, parse=parse_float(0, 100_000), unit="blocks",
        help="Cost of each request in flight; 0 since blocks measure load, raise it if many short requests share one long prefix.",
    )
    router_temperature: float = setting(
        env="DYN_ROUTER_TEMPERATURE", default=0.0, parse=parse_float(0, 1000),
        help="Softmax temperature over normalised costs; 0 takes the cheapest, which is best unless routers don't see each other.",
    )

    kv_events: bool = setting(
        env="DYN_KV_EVENTS", default=True, parse=parse_bool,
        help="Learn from the workers' KV events what they hold. Off: believe for `router_ttl` that each has what it was sent.",
    )
    router_ttl: float = setting(
        env="DYN_ROUTER_TTL", default=120.0, parse=parse_float(0.001, DAY_S), unit="s",
        help="Without events, how long a prompt is believed to stay in its worker's cache.",
    )
    router_max_tree_size: int = setting(
        env="DYN_ROUTER_MAX_TREE_SIZE", default=2**20, parse=parse_int(1, 2**32), unit="blocks",
        help="Without events, blocks believed in at most, over all workers: a bound on memory of 8 bytes a block and 1 KB a prompt.",
    )
    router_prune_target_ratio: float = setting(
        env="DYN_ROUTER_PRUNE_TARGET_RATIO", default=0.8, parse=parse_float(0, 1),
        help="Beyond that bound the earliest beliefs go until this share of it is left, so that pruning is rare.",
    )
    router_predicted_ttl_secs: float = setting(
        env="DYN_ROUTER_PREDICTED_TTL_SECS", default=2.0, parse=parse_float(0, DAY_S), unit="s",
        help="With events, how long a decision counts as a hit before its events arrive, so that bursts stay together; 0 for never.",
    )

    router_snapshot_folder: str = setting(
        env="TANDEM_ROUTER_SNAPSHOT_FOLDER", default="", parse=str,
        help="Folder in which each instance keeps its index for a warm restart; empty for none, since a cold one only costs some replays.",
    )
    router_snapshot_interval_s: float = setting(
        env="TANDEM_ROUTER_SNAPSHOT_INTERVAL_S", default=60.0, parse=parse_float(0.1, DAY_S), unit="s",
        help="Time between two saves, besides the one at the end; well below what the workers' replay buffers bridge after a crash.",
    )

    router_track_active_blocks: bool = setting(
        env="DYN_ROUTER_TRACK_ACTIVE_BLOCKS", default=True, parse=parse_bool,
        help="Count the blocks of requests in flight as decode load. Off: the prefill blocks stand for it.",
    )
    router_track_output_blocks: bool = setting(
        env="DYN_ROUTER_TRACK_OUTPUT_BLOCKS", default=False, parse=parse_bool,
        help="Count generated blocks too; worth its updates only where outputs are long against prompts.",
    )
    router_assume_kv_reuse: bool = setting(
        env="DYN_ROUTER_ASSUME_KV_REUSE", default=True, parse=parse_bool,
        help="Count a prefix shared by requests in flight once, as vLLM stores it. Off: for workers without prefix caching.",
    )
    router_replica_sync: bool = setting(
        env="DYN_ROUTER_REPLICA_SYNC", default=False, parse=parse_bool,
        help="Share the books of requests in flight with the other routers of these workers; off since one router has nobody to tell.",
    )

    router_replica_host: str = setting(
        env="TANDEM_ROUTER_REPLICA_HOST", default="127.0.0.1", parse=str,
        help="Address of this host at which other routers reach its books; loopback, since whoever reaches it sees block keys.",
    )
    router_replica_port: int = setting(
        env="TANDEM_ROUTER_REPLICA_PORT", default=0, parse=parse_int(0, 65_534), unit="port",
        help="First of two ports for that, the next instance has the next two; 0 takes any free ones, since discovery tells them.",
    )

    active_decode_blocks_threshold: float | None = setting(
        env="DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD", default=None, parse=_or_unset(parse_float(0, 1)), unit="share of KV blocks",
        help="A worker with more of its KV blocks in use by requests in flight is busy; unset: never.",
    )
    active_prefill_tokens_threshold: int | None = setting(
        env="DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD", default=None, parse=_or_unset(parse_int(0, 2**40)), unit="tokens",
        help="A worker with more prompt tokens waiting to be computed is busy; unset: never.",
    )
    active_prefill_tokens_threshold_frac: float | None = setting(
        env="DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC", default=None, parse=_or_unset(parse_float(0, 1_000_000)),
        unit="of max_num_batched_tokens", help="The same in engine steps: 2 means busy from two full prefill steps on; unset: never.",
    )

    enforce_disagg: bool = setting(
        env="DYN_ENFORCE_DISAGG", default=False, parse=parse_bool,
        help="Every prompt is prefilled remotely, or fails. Off: the decode worker prefills by itself while no prefill worker can.",
    )
    router_conditional_disagg: bool = setting(
        env="DYN_ROUTER_CONDITIONAL_DISAGG", default=False, parse=parse_bool,
        help="Short prompts are prefilled by the decode worker; off since decode workers must publish KV events for it.",
    )
    conditional_disagg_tokens: int = setting(
        env="TANDEM_CONDITIONAL_DISAGG_TOKENS", default=2048, parse=parse_int(1, 2**31), unit="tokens",
        help="From so many non-cached tokens on a prompt is prefilled remotely, if that is conditional; Dynamo's effective length.",
    )

    migration_limit: int = setting(
        env="DYN_MIGRATION_LIMIT", default=3, parse=parse_int(0, 100), unit="moves",
        help="How often one request may move on when its worker breaks. 3 (Dynamo: 0): a lost worker should cost no client its answer.",
    )
    down_s: float = setting(
        env="TANDEM_ROUTER_DOWN_S", default=5.0, parse=parse_float(0, DAY_S), unit="s",
        help="After a broken stream, how long a worker gets nothing unless its record changes; Dynamo's interval of reconciliation.",
    )
    max_queued_requests: int = setting(
        env="TANDEM_ROUTER_MAX_QUEUED_REQUESTS", default=4096, parse=parse_int(1, 1_000_000), unit="requests",
        help="Requests in flight in one router beyond which new ones get UNAVAILABLE: a bound on memory, as in the worker.",
    )
    placement_timeout_s: float = setting(
        env="TANDEM_ROUTER_PLACEMENT_TIMEOUT_S", default=30.0, parse=parse_float(0, DAY_S), unit="s",
        help="How long a request may wait for a worker that takes it; 0 refuses at once.",
    )
    prefill_timeout_s: float = setting(
        env="TANDEM_ROUTER_PREFILL_TIMEOUT_S", default=30.0, parse=parse_float(0.001, DAY_S), unit="s",
        help="How long a remote prefill may take; it is also how long NIXL holds a handoff's blocks.",
    )
    transfer_timeout_s: float = setting(
        env="TANDEM_ROUTER_TRANSFER_TIMEOUT_S", default=60.0, parse=parse_float(0.001, DAY_S), unit="s",
        help="After a remote prefill, how long the first token may take; then the decode worker prefills itself, and the pair hands "
             "nothing over for as long again. A KV transfer over a dead network would wait for ever.",
    )
    first_token_timeout_s: float = setting(
        env="TANDEM_ROUTER_FIRST_TOKEN_TIMEOUT_S", default=300.0, parse=parse_float(0.001, DAY_S), unit="s",
        help="How long the first token may take, queueing in the engine included; wide, since a full engine is slow, not broken.",
    )
    next_token_timeout_s: float = setting(
        env="TANDEM_ROUTER_NEXT_TOKEN_TIMEOUT_S", default=60.0, parse=parse_float(0.001, DAY_S), unit="s",
        help="How long any later token may take before the stream counts as broken.",
    )

    model: str = setting(
        env="TANDEM_ROUTER_MODEL", default="", parse=str,
        help="Model that this router serves, as its workers name it; empty takes the first worker's. Others are left alone.",
    )
    router_tokenizer: str = setting(
        env="TANDEM_ROUTER_TOKENIZER", default="", parse=str,
        help="Folder or name of the tokenizer; empty takes the model's own, which is the workers'.",
    )
    discovery: str = setting(
        env="TANDEM_DISCOVERY", default="", parse=_discovery_url, flag=False,
        help="Where workers are found; there is no default, since only the launcher knows its folder.",
    )
    router_admin_host: str = setting(
        env="TANDEM_ROUTER_ADMIN_HOST", default="127.0.0.1", parse=str,
        help="Address of the router's admin server; loopback, since thresholds can be set there.",
    )
    router_admin_port: int = setting(
        env="TANDEM_ROUTER_ADMIN_PORT", default=8079, parse=parse_int(0, 65_535), unit="port",
        help="Port of the admin server of the first instance, the next has the next; 0 for none. Below the workers' 8081.",
    )
    cancel_poll_s: float = setting(
        env="TANDEM_ROUTER_CANCEL_POLL_S", default=0.25, parse=parse_float(0.01, 10), unit="s",
        help="How often a request asks Triton whether its client went away; each poll takes about 0.1 ms from the token streams.",
    )
    triton_metrics_interval_s: float = setting(
        env="TANDEM_ROUTER_TRITON_METRICS_INTERVAL_S", default=0.0, parse=parse_float(0, 3600), unit="s", flag=False,
        help="How often the router's metrics on Triton's own metrics port are brought up to date. 0: not there, so that none counts twice.",
    )
    server_exit_timeout_s: float = setting(
        env="TANDEM_SERVER_EXIT_TIMEOUT_S", default=30.0, parse=parse_float(1, DAY_S), unit="s",
        help="After the router's stub died, how long tritonserver may take to exit before it is killed, so that a supervisor restarts it.",
    )

    def __post_init__(self) -> None:
        if self.kv_overlap_score_weight is not None and self.router_prefill_load_scale != PREFILL_LOAD_SCALE:
            raise ConfigError("DYN_KV_OVERLAP_SCORE_WEIGHT and DYN_ROUTER_PREFILL_LOAD_SCALE are one factor by two names: set only one")
        if self.router_track_output_blocks and not self.router_track_active_blocks:
            raise ConfigError("output blocks are counted among the active ones: set DYN_ROUTER_TRACK_ACTIVE_BLOCKS, "
                              "or leave out DYN_ROUTER_TRACK_OUTPUT_BLOCKS")
        if self.enforce_disagg and self.router_conditional_disagg:
            raise ConfigError("DYN_ENFORCE_DISAGG and DYN_ROUTER_CONDITIONAL_DISAGG exclude each other: set one of them")
        if self.router_temperature > 0 and self.router_mode is not RouterMode.KV:
            raise ConfigError(f"DYN_ROUTER_TEMPERATURE has no effect in mode {self.router_mode}: leave it out, or set DYN_ROUTER_MODE=kv")

    @property
    def prefill_load_scale(self) -> float:
        """The factor before the prefill term, by whichever name it was set."""
        return self.router_prefill_load_scale if self.kv_overlap_score_weight is None else self.kv_overlap_score_weight

    @property
    def reads_events(self) -> bool:
        """Whether the router subscribes to KV events: only where they can change a decision."""
        if not self.kv_events:
            return False
        return self.router_conditional_disagg or (self.router_mode is RouterMode.KV and self.prefill_load_scale > 0)


def load_settings(parameters: Mapping[str, str], environ: Mapping[str, str] | None = None) -> RouterSettings:
    """Resolves a router's settings from its config.pbtxt parameters (name -> string) and the environment."""
    return resolve(RouterSettings, parameters, os.environ if environ is None else environ)
