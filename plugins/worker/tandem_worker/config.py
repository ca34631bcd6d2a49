# SPDX-License-Identifier: Apache-2.0
"""A worker's settings, from the environment and the model's config parameters.

This is the one module of the worker that reads the environment. Engine arguments are not here: they stand in
`model.json`, as in Triton's vllm_backend, and `arguments.py` completes and checks them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from tandem_protocol.discovery import check_url
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_protocol.settings import parse_bool, parse_float, parse_int, parse_words, resolve, setting
from tandem_worker.canary import parse_payload
from tandem_worker.metrics.labels import check_labels

TRITON_PARAMETERS = frozenset({"FORCE_CPU_ONLY_INPUT_TENSORS", "EXECUTION_ENV_PATH", "TRITON_BATCH_STRATEGY_PATH"})
"""Parameters that belong to Triton's Python backend."""
IGNORED_PARAMETERS = frozenset({"REPORT_CUSTOM_METRICS", "ENABLE_VLLM_HEALTH_CHECK"})
"""Parameters of Triton's vllm_backend that a drop-in replacement accepts; metrics and health are always on here."""

REGISTERED_PORTS = (1024, 49151)
HIGHEST_PORT = 65535
CONSOLIDATED_PORT_VARIABLE = "TANDEM_CONSOLIDATED_PORT"


def _host_and_port(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) <= HIGHEST_PORT):
        raise ValueError("expected host:port")
    return text


def _http_url(text: str) -> str:
    if text and not text.startswith(("http://", "https://")):
        raise ValueError("expected a URL like http://host:8081")
    return text


def _port_or_off(text: str) -> int:
    port = int(text)
    if port != -1 and not 0 <= port <= HIGHEST_PORT:
        raise ValueError("expected a port, 0 for any free one, or -1 for none")
    return port


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of one worker, resolved; units are in the names or in the specs."""

    role: Role | None = setting(  # noqa: RUF009 - makes a dataclass field, like dataclasses.field itself
        env="TANDEM_ROLE", default=None, parse=Role, flag=False,
        help="aggregated, prefill, decode or encode; set by the model's config.pbtxt, since one server may hold all of them.",
    )
    is_prefill_worker: bool = setting(
        env="DYN_VLLM_IS_PREFILL_WORKER", default=False, parse=parse_bool, help="Serve as a prefill worker, whatever `role` says."
    )
    is_decode_worker: bool = setting(
        env="DYN_VLLM_IS_DECODE_WORKER", default=False, parse=parse_bool, help="Serve as a decode worker, whatever `role` says."
    )
    model: str = setting(
        env="TANDEM_MODEL", default="", parse=str, flag=False,
        help="Model folder or hub id; wins over `model` in model.json so that one repository serves any model.",
    )
    connector: tuple[str, ...] | None = setting(
        env="DYN_CONNECTOR", default=None, parse=parse_words,
        help="KV connectors in order: nixl, lmcache, kvbm, or null/none alone. Unset: nixl for prefill and decode, none for aggregated.",
    )
    prefill_connector: tuple[str, ...] | None = setting(
        env="TANDEM_PREFILL_CONNECTOR", default=None, parse=parse_words,
        help="Connectors of prefill workers in place of `connector`, e.g. `kvbm nixl`: offloading pays where prompts are computed.",
    )
    use_vllm_tokenizer: bool = setting(
        env="DYN_VLLM_USE_TOKENIZER", default=True, parse=parse_bool,
        help="Text in and out by vLLM's tokenizer. Off: token ids only, which saves the worker's CPU behind a tokenizing front end.",
    )
    worker_index: int = setting(
        env="TANDEM_WORKER_INDEX", default=0, parse=parse_int(0, 999), flag=False,
        help="This worker's number on its host; admin, KV-event and side-channel ports are offset by it so that workers never collide.",
    )
    gpus: str = setting(
        env="TANDEM_GPUS", default="", parse=str, flag=False,
        help="CUDA_VISIBLE_DEVICES of this worker, e.g. `0,1`; empty leaves the server's own. One model per engine makes this explicit.",
    )
    cpu_cores: str = setting(
        env="TANDEM_CPU_CORES", default="", parse=str, flag=False,
        help="Cores of a CPU engine (VLLM_CPU_OMP_THREADS_BIND), e.g. `0` or `0-3`; empty lets vLLM choose.",
    )
    kv_event_port: int = setting(
        env="DYN_VLLM_KV_EVENT_PORT", default=20080, parse=parse_int(*REGISTERED_PORTS), unit="port",
        help="First ZMQ port of KV events, plus worker index and data-parallel rank. Registered ports only: ephemeral ones get taken.",
    )
    consolidated_port: int = setting(
        env=CONSOLIDATED_PORT_VARIABLE, default=0, parse=parse_int(0, HIGHEST_PORT), unit="port", flag=False,
        help="First port at which consolidators publish for workers with kvbm, plus worker index: what routers are told in place of the "
             "engine's. 0: none do. `tandem serve` sets it.",
    )
    side_channel_port: int = setting(
        env="VLLM_NIXL_SIDE_CHANNEL_PORT", default=5600, parse=parse_int(*REGISTERED_PORTS), unit="port",
        help="First port of NIXL's handshake (vLLM's own variable), plus worker index and data-parallel rank.",
    )
    side_channel_host: str = setting(
        env="VLLM_NIXL_SIDE_CHANNEL_HOST", default="", parse=str,
        help="Address on which peers reach this worker's NIXL handshake. Empty: this host's address if it can be bound, else loopback.",
    )
    admin_host: str = setting(
        env="DYN_SYSTEM_HOST", default="127.0.0.1", parse=str,
        help="Address of the admin server. Loopback: it can drain and abort, so it is not for the outside.",
    )
    admin_port: int = setting(
        env="DYN_SYSTEM_PORT", default=8081, parse=_port_or_off, unit="port", help="First admin port, plus worker index; -1 for none."
    )
    namespace: str = setting(
        env="DYN_NAMESPACE", default="dynamo", parse=str, help="Label `dynamo_namespace` of this worker's metrics: the deployment's name."
    )
    metrics_labels: str = setting(
        env="TANDEM_METRICS_LABELS", default="", parse=check_labels,
        help="Further labels of the engine's and the worker's metrics, `name=value,name=value`, for series that have no such label yet.",
    )
    triton_metrics_interval_s: float = setting(
        env="TANDEM_TRITON_METRICS_INTERVAL_S", default=5.0, parse=parse_float(0, 3600), unit="s",
        help="How often the metrics on Triton's own metrics port are brought up to date; each change costs a round trip. 0: not there.",
    )
    discovery: str = setting(
        env="TANDEM_DISCOVERY", default="", parse=check_url,
        help="Where workers register and routers find them: file:/folder, etcd://host:port[/prefix], kubernetes, or empty for none. "
             "`tandem serve` sets a folder of its run.",
    )
    grpc_url: str = setting(
        env="TANDEM_GRPC_URL", default="127.0.0.1:8001", parse=_host_and_port,
        help="host:port at which routers reach this server's gRPC; its host also goes into the addresses of KV events. "
             "`tandem serve` sets loopback and its own port.",
    )
    conditional_disagg: bool = setting(
        env="TANDEM_CONDITIONAL_DISAGG", default=False, parse=parse_bool,
        help="Decode workers publish KV events too, so that a router can skip the remote prefill of a prompt that they have cached.",
    )
    response_rate: int = setting(
        env="TANDEM_RESPONSE_RATE", default=1500, parse=parse_int(1, 1_000_000), unit="responses/s",
        help="Above this many streamed tokens per second, tokens of one request share a response: each costs the Python stub 0.1-0.35 ms.",
    )
    drain_timeout_s: float = setting(
        env="TANDEM_DRAIN_TIMEOUT_S", default=20.0, parse=parse_float(0, 86_400), unit="s",
        help="On shutdown, how long requests in flight may finish before they are aborted; below Triton's exit timeout of 30 s.",
    )
    server_exit_timeout_s: float = setting(
        env="TANDEM_SERVER_EXIT_TIMEOUT_S", default=30.0, parse=parse_float(1, 86_400), unit="s",
        help="After an engine or stub died, how long tritonserver may take to exit before it is killed, so that a supervisor restarts it.",
    )
    hang_timeout_s: float = setting(
        env="TANDEM_HANG_TIMEOUT_S", default=30.0, parse=parse_float(0, 86_400), unit="s",
        help="An engine that has work but neither steps nor computes for this long hangs: its requests fail, the server exits. 0: never.",
    )
    step_timeout_s: float = setting(
        env="TANDEM_STEP_TIMEOUT_S", default=300.0, parse=parse_float(1, 86_400), unit="s",
        help="A step may take this long while it computes, as the first on a slow CPU does; then it hangs, too. vLLM's own bound.",
    )
    health_check_enabled: bool = setting(
        env="DYN_HEALTH_CHECK_ENABLED", default=False, parse=parse_bool,
        help="Send a request of one token to an idle engine, and be unready while it is not answered. Off: an idle engine stays untouched.",
    )
    canary_wait_time: float = setting(
        env="DYN_CANARY_WAIT_TIME", default=10.0, parse=parse_float(0.1, 86_400), unit="s",
        help="How long a worker is idle before a canary, and the time between two.",
    )
    health_check_request_timeout: float = setting(
        env="DYN_HEALTH_CHECK_REQUEST_TIMEOUT", default=3.0, parse=parse_float(0.1, 86_400), unit="s",
        help="A canary that takes longer makes the worker unready until it is answered; it stays in the engine, so that a hang shows.",
    )
    health_check_payload: str = setting(
        env="DYN_HEALTH_CHECK_PAYLOAD", default="", parse=parse_payload,
        help="JSON: `prompt` or `token_ids`, perhaps `sampling_options`, `stop_conditions`. Unset: `Test`, or BOS for workers of ids only.",
    )
    sleep_mode_level: int = setting(
        env="DYN_VLLM_SLEEP_MODE_LEVEL", default=1, parse=parse_int(1, 2),
        help="Level of `/engine/sleep` without one, and of checkpoints: 1 keeps the weights in host memory, 2 reads them again on waking.",
    )
    checkpoint_signal_file: str = setting(
        env="DYN_CHECKPOINT_SIGNAL_FILE", default="", parse=str, flag=False,
        help="Start to be dumped: sleep, wait, and serve only when restored. The agent writes this file when the dump is done or failed.",
    )
    ready_for_checkpoint_file: str = setting(
        env="DYN_READY_FOR_CHECKPOINT_FILE", default="", parse=str, flag=False,
        help="Written by the worker when it can be dumped.",
    )
    checkpoint_storage_type: str = setting(
        env="DYN_CHECKPOINT_STORAGE_TYPE", default="", parse=str, flag=False, help="Where dumps are kept; only `pvc`, a mounted folder."
    )
    checkpoint_location: str = setting(
        env="DYN_CHECKPOINT_LOCATION", default="", parse=str, flag=False,
        help="Folder of the dump. With a `checkpoint.done` of success in it the worker ends at once, with success.",
    )
    restore_marker_file: str = setting(
        env="DYN_RESTORE_MARKER_FILE", default="", parse=str, flag=False,
        help="Made by whoever restores the dump, before: a held worker that sees it wakes and serves.",
    )
    checkpoint_timeout_s: float = setting(
        env="TANDEM_CHECKPOINT_TIMEOUT_S", default=600.0, parse=parse_float(1, 86_400), unit="s", flag=False,
        help="How long a worker that can be dumped is held; below the bound on a server's start (`--start-timeout`).",
    )
    leader_url: str = setting(
        env="TANDEM_LEADER_URL", default="", parse=_http_url,
        help="Of a follower (--headless): the admin server of its leader. Empty: --data-parallel-address, at this worker's own admin port.",
    )
    leader_timeout_s: float = setting(
        env="TANDEM_LEADER_TIMEOUT_S", default=900.0, parse=parse_float(1, 86_400), unit="s",
        help="How long a follower looks for its leader, whose admin server answers once all engines run; then it gives up.",
    )
    max_queued_requests: int = setting(
        env="TANDEM_MAX_QUEUED_REQUESTS", default=4096, parse=parse_int(1, 1_000_000), unit="requests",
        help="Requests in flight in one worker beyond which new ones get UNAVAILABLE: a bound on memory, far above any useful batch.",
    )
    cancel_poll_s: float = setting(
        env="TANDEM_CANCEL_POLL_S", default=0.25, parse=parse_float(0.01, 10), unit="s",
        help="How often a request asks Triton whether its client went away; a poll costs about 0.1 ms, and 0.25 s keeps the 1 s promise.",
    )
    lora_enabled: bool = setting(
        env="DYN_LORA_ENABLED", default=False, parse=parse_bool,
        help="Adapters may be loaded and unloaded at run time (`/v1/loras`); engines get --enable-lora. Off: only multi_lora.json's.",
    )
    lora_path: str = setting(
        env="DYN_LORA_PATH", default="~/.cache/dynamo_loras", parse=str,
        help="Where this host's workers keep copies of loaded adapters (Dynamo's default): engines read only these, so sources may vanish.",
    )
    lora_roots: str = setting(
        env="TANDEM_LORA_ROOTS", default="", parse=str,
        help="Folders, with colons between, that `file://` adapters may come from. Empty: only `lora_path`, since any caller names a file.",
    )
    lora_load_timeout_s: float = setting(
        env="VLLM_LORA_MODULES_LOADING_TIMEOUT", default=600.0, parse=parse_float(0.1, 86_400), unit="s",
        help="How long an adapter may take to arrive, or wait for an earlier change of its name; Dynamo's value.",
    )
    lora_max_gb: float = setting(
        env="TANDEM_LORA_MAX_GB", default=4.0, parse=parse_float(0.000001, 1_000), unit="GB",
        help="The most that one adapter's files may have: a bound on the disk that a wrong URI fills; rank 128 on all of Llama 70B is 3.3.",
    )
    lora_max_adapters: int = setting(
        env="TANDEM_LORA_MAX_ADAPTERS", default=128, parse=parse_int(1, 10_000), unit="adapters",
        help="The most adapters that a worker lists; beyond vLLM's max_cpu_loras they are read from disk again when used.",
    )
    lora_s3_endpoint: str = setting(
        env="AWS_ENDPOINT", default="", parse=str, help="URL of the S3-compatible store of `s3://` adapters; empty for AWS."
    )
    lora_s3_region: str = setting(
        env="AWS_REGION", default="us-east-1", parse=str, help="Region of the buckets of `s3://` adapters; Dynamo's default."
    )
    lora_s3_allow_http: bool = setting(
        env="AWS_ALLOW_HTTP", default=False, parse=parse_bool,
        help="Let AWS_ENDPOINT be http://. Off: keys and weights would travel in the open.",
    )

    def __post_init__(self) -> None:
        if self.is_prefill_worker and self.is_decode_worker:
            raise ConfigError("--is-prefill-worker and --is-decode-worker exclude each other: set one of them")
        if self.effective_admin_port > HIGHEST_PORT:
            raise ConfigError(f"admin port {self.effective_admin_port} is beyond {HIGHEST_PORT}: lower DYN_SYSTEM_PORT")

    @property
    def effective_role(self) -> Role:
        """The role, after the two flags that override it."""
        if self.is_prefill_worker:
            return Role.PREFILL
        if self.is_decode_worker:
            return Role.DECODE
        return self.role or Role.AGGREGATED

    @property
    def publishes_kv_events(self) -> bool:
        """Whether a router has a use for this worker's KV events: decode workers' only serve conditional disaggregation."""
        role = self.effective_role
        return role not in (Role.ENCODE, Role.OMNI) and (role is not Role.DECODE or self.conditional_disagg)

    @property
    def effective_consolidated_port(self) -> int:
        """Where a consolidator publishes for this worker; 0 if none does. Only kvbm's tiers make one worth it."""
        return self.consolidated_port + self.worker_index if self.consolidated_port and "kvbm" in self.effective_connectors else 0

    @property
    def effective_admin_port(self) -> int:
        """The admin port of this worker; 0 (any) and -1 (none) are not offset."""
        return self.admin_port + self.worker_index if self.admin_port > 0 else self.admin_port

    @property
    def effective_connectors(self) -> tuple[str, ...]:
        """The connectors, after the role's default; an encode worker has no KV."""
        if self.effective_role is Role.ENCODE:
            return ("none",)
        if self.effective_role is Role.PREFILL and self.prefill_connector is not None:
            return self.prefill_connector
        if self.connector is not None:
            return self.connector
        return ("nixl",) if self.effective_role.is_disaggregated else ("none",)


def load_settings(parameters: Mapping[str, str], environ: Mapping[str, str] | None = None) -> WorkerSettings:
    """Resolves a worker's settings from its config.pbtxt parameters (name -> string) and the environment."""
    own = {name: value for name, value in parameters.items() if name not in TRITON_PARAMETERS | IGNORED_PARAMETERS}
    return resolve(WorkerSettings, own, os.environ if environ is None else environ)


def setting_names() -> tuple[str, ...]:
    """Names of all settings, in order."""
    return tuple(field.name for field in fields(WorkerSettings))
