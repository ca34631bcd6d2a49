# SPDX-License-Identifier: Apache-2.0
"""Settings of the planner's decisions. The one module of the planner's pure half that reads the environment.

Names and units are Dynamo's where it has the setting: latencies in milliseconds, so that its command lines and profiles can be taken
over. What a field means in a decision stands where it is used: `sla_plan`, `load_plan`, `stability`, `budget`.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tandem_planner.terms import Mode
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role
from tandem_protocol.settings import parse_bool, parse_float, parse_int, resolve, setting, specs_of

NO_BUDGET = -1


class Statistic(StrEnum):
    """Which figure of a latency's distribution a target is for."""

    MEAN = "mean"
    P50 = "p50"
    P95 = "p95"
    P99 = "p99"

    @property
    def quantile(self) -> float | None:
        """Between 0 and 1; None for the mean."""
        return None if self is Statistic.MEAN else int(self.value[1:]) / 100


class PredictorName(StrEnum):
    """How the next interval's traffic is foreseen."""

    CONSTANT = "constant"
    ARIMA = "arima"
    KALMAN = "kalman"
    SEASONAL = "seasonal"
    PROPHET = "prophet"


_latency = parse_float(0.001, 3_600_000)
_count = parse_int(0, 10_000)
_gpus = parse_int(1, 1024)


@dataclass(frozen=True)
class PlannerConfig:
    """Settings of one planner, resolved; units are in the names or in the specs."""

    mode: Mode = setting(  # noqa: RUF009 - makes a dataclass field, like dataclasses.field itself
        env="TANDEM_PLANNER_MODE", default=Mode.DISAGGREGATED, parse=Mode,
        help="Which pools it scales: disagg (both), prefill, decode, or agg.",
    )
    adjustment_interval: float = setting(
        env="TANDEM_PLANNER_ADJUSTMENT_INTERVAL", default=180.0, parse=parse_float(1, 86_400), unit="s",
        help="Time between two plans from the traffic; Dynamo's, several times the start of a worker.",
    )
    worker_start: float = setting(
        env="TANDEM_PLANNER_WORKER_START", default=60.0, parse=parse_float(0, 86_400), unit="s",
        help="Time from a decision until a new worker takes requests: traffic is foreseen so far beyond the next interval.",
    )
    load_interval: float = setting(
        env="TANDEM_PLANNER_LOAD_INTERVAL", default=5.0, parse=parse_float(0.1, 3600), unit="s",
        help="Time between two looks at queues and KV use: a burst must not wait for the next plan.",
    )
    load_scaling: bool = setting(
        env="TANDEM_PLANNER_LOAD_SCALING", default=True, parse=parse_bool,
        help="Go above the plan while an engine is overloaded. Off: only the traffic decides.",
    )
    throughput_scaling: bool = setting(
        env="TANDEM_PLANNER_THROUGHPUT_SCALING", default=True, parse=parse_bool,
        help="Plan from traffic and profile, which sets the floor of load scaling. Off, or without a profile: only load decides.",
    )
    max_gpu_budget: int = setting(
        env="TANDEM_PLANNER_MAX_GPU_BUDGET", default=8, parse=parse_int(NO_BUDGET, 1_000_000), unit="GPUs",
        help="GPUs that the pools may hold together; -1 for no bound. 8 is one host, as in Dynamo.",
    )
    min_endpoint: int = setting(
        env="TANDEM_PLANNER_MIN_ENDPOINT", default=1, parse=_count, unit="workers",
        help="Workers that each pool keeps; 0 lets an idle pool end, and its first request waits for a start.",
    )
    min_prefill: int | None = setting(
        env="TANDEM_PLANNER_MIN_PREFILL", default=None, parse=_count, unit="workers", help="The same for prefill workers alone.",
    )
    min_decode: int | None = setting(
        env="TANDEM_PLANNER_MIN_DECODE", default=None, parse=_count, unit="workers", help="The same for decode workers alone.",
    )
    max_encode: int = setting(
        env="TANDEM_PLANNER_MAX_ENCODE", default=0, parse=_count, unit="workers",
        help="Encode workers at most, beside the pools of the mode; 0: they are left alone. Scaled by load only, as no profile knows them.",
    )
    min_encode: int = setting(
        env="TANDEM_PLANNER_MIN_ENCODE", default=1, parse=parse_int(1, 10_000), unit="workers",
        help="Encode workers at least, whatever min_endpoint is: an empty pool has no load by which it could grow.",
    )
    prefill_engine_num_gpu: int = setting(
        env="TANDEM_PLANNER_PREFILL_ENGINE_NUM_GPU", default=1, parse=_gpus, unit="GPUs", help="GPUs of one prefill engine.",
    )
    decode_engine_num_gpu: int = setting(
        env="TANDEM_PLANNER_DECODE_ENGINE_NUM_GPU", default=1, parse=_gpus, unit="GPUs", help="GPUs of one decode or aggregated engine.",
    )
    encode_engine_num_gpu: int = setting(
        env="TANDEM_PLANNER_ENCODE_ENGINE_NUM_GPU", default=1, parse=_gpus, unit="GPUs", help="GPUs of one encode engine.",
    )
    profile_results_dir: str = setting(
        env="TANDEM_PLANNER_PROFILE_RESULTS_DIR", default="", parse=str,
        help="Folder that `tandem profile` (or Dynamo's profiler) wrote; empty: only load scaling, since a plan needs figures.",
    )
    isl: float = setting(
        env="TANDEM_PLANNER_ISL", default=3000.0, parse=parse_float(1, 10_000_000), unit="tokens",
        help="Prompt length for which the targets are checked at start, and which holds until there is traffic.",
    )
    osl: float = setting(
        env="TANDEM_PLANNER_OSL", default=150.0, parse=parse_float(1, 10_000_000), unit="tokens", help="The same for generated tokens.",
    )
    ttft: float = setting(
        env="TANDEM_PLANNER_TTFT", default=500.0, parse=_latency, unit="ms",
        help="Target of the time to the first token; refused at start if the profile can't reach it.",
    )
    itl: float = setting(
        env="TANDEM_PLANNER_ITL", default=50.0, parse=_latency, unit="ms", help="Target of the time between two tokens; refused likewise.",
    )
    sla_statistic: Statistic = setting(  # noqa: RUF009 - as above
        env="TANDEM_PLANNER_SLA_STATISTIC", default=Statistic.P95, parse=Statistic,
        help="What the targets are for: mean (Dynamo's), p50, p95, p99. p95: a mean hides the bursts that users feel.",
    )
    queue_variability: float = setting(
        env="TANDEM_PLANNER_QUEUE_VARIABILITY", default=1.0, parse=parse_float(0.05, 100),
        help="Mean of the squared variations of arrivals and prompt lengths, for queueing: 0.5 equal prompts at random, 1 mixed prompts.",
    )
    load_predictor: PredictorName = setting(  # noqa: RUF009 - as above
        env="TANDEM_PLANNER_LOAD_PREDICTOR", default=PredictorName.KALMAN, parse=PredictorName,
        help="constant, kalman, seasonal, arima, prophet. kalman (Dynamo: arima) follows a slope; seasonal also knows what comes again.",
    )
    load_predictor_log1p: bool = setting(
        env="TANDEM_PLANNER_LOAD_PREDICTOR_LOG1P", default=False, parse=parse_bool,
        help="Predict logarithms, so that growth by a share is a straight line; for traffic that multiplies.",
    )
    load_predictor_warmup_trace: str = setting(
        env="TANDEM_PLANNER_LOAD_PREDICTOR_WARMUP_TRACE", default="", parse=str,
        help="Trace (JSONL, as Mooncake's) whose last interval is taken to end at the start, so that predictors know a past.",
    )
    prophet_window_size: int = setting(
        env="TANDEM_PLANNER_PROPHET_WINDOW_SIZE", default=50, parse=parse_int(2, 500), unit="intervals",
        help="Intervals that Prophet is fitted to.",
    )
    kalman_q_level: float = setting(
        env="TANDEM_PLANNER_KALMAN_Q_LEVEL", default=1.0, parse=parse_float(1e-9, 1e9),
        help="Variance by which the level drifts in an interval.",
    )
    kalman_q_trend: float = setting(
        env="TANDEM_PLANNER_KALMAN_Q_TREND", default=0.1, parse=parse_float(1e-9, 1e9),
        help="Variance by which the slope drifts in an interval.",
    )
    kalman_r: float = setting(
        env="TANDEM_PLANNER_KALMAN_R", default=10.0, parse=parse_float(1e-9, 1e9),
        help="Variance of one observation; only the ratios to the two above matter in the long run.",
    )
    kalman_min_points: int = setting(
        env="TANDEM_PLANNER_KALMAN_MIN_POINTS", default=5, parse=parse_int(2, 500), unit="intervals",
        help="Intervals until the filter is trusted; before, the last one stands for the next.",
    )
    no_correction: bool = setting(
        env="TANDEM_PLANNER_NO_CORRECTION", default=False, parse=parse_bool,
        help="Take the profile as it is, instead of learning how the fleet differs from it.",
    )
    no_operation: bool = setting(
        env="TANDEM_PLANNER_NO_OPERATION", default=False, parse=parse_bool, help="Decide and explain, but scale nothing.",
    )
    max_throughput_scaling_replicas: int = setting(
        env="TANDEM_PLANNER_MAX_THROUGHPUT_SCALING_REPLICAS", default=8, parse=parse_int(1, 10_000), unit="workers",
        help="Workers by which a pool changes in one decision; floors and the budget go before it.",
    )
    scale_down_margin: float = setting(
        env="TANDEM_PLANNER_SCALE_DOWN_MARGIN", default=0.1, parse=parse_float(0, 10),
        help="A smaller pool must be enough for so much more traffic (0.1: a tenth), so that noise doesn't move workers.",
    )
    scale_down_patience: int = setting(
        env="TANDEM_PLANNER_SCALE_DOWN_PATIENCE", default=2, parse=parse_int(1, 1000), unit="plans",
        help="Plans in a row that must ask for fewer workers before any goes: a start costs more than an idle interval.",
    )
    scale_down_window: float = setting(
        env="TANDEM_PLANNER_SCALE_DOWN_WINDOW", default=60.0, parse=parse_float(1, 86_400), unit="s",
        help="The highest load of this time decides whether one worker fewer is enough.",
    )
    load_scaling_down_sensitivity: float = setting(
        env="TANDEM_PLANNER_LOAD_SCALING_DOWN_SENSITIVITY", default=80.0, parse=parse_float(1, 100), unit="%",
        help="Of the threshold for more workers that the survivors may reach when one goes; Dynamo's.",
    )
    prefill_scale_up_queue_tokens: float = setting(
        env="TANDEM_PLANNER_PREFILL_SCALE_UP_QUEUE_TOKENS", default=8192.0, parse=parse_float(1, 1e9), unit="tokens",
        help="Without a profile: prompt tokens queued on one engine above which the pool grows. With one, the TTFT says how many.",
    )
    prefill_scale_down_queue_tokens: float = setting(
        env="TANDEM_PLANNER_PREFILL_SCALE_DOWN_QUEUE_TOKENS", default=1024.0, parse=parse_float(0, 1e9), unit="tokens",
        help="Without a profile: every engine must be below it for the pool to shrink.",
    )
    decode_scale_up_kv_rate: float = setting(
        env="TANDEM_PLANNER_DECODE_SCALE_UP_KV_RATE", default=90.0, parse=parse_float(1, 100), unit="% of KV blocks",
        help="KV use of one engine above which the pool grows, or where the profile has the target ITL if that is less.",
    )
    decode_scale_down_kv_rate: float = setting(
        env="TANDEM_PLANNER_DECODE_SCALE_DOWN_KV_RATE", default=50.0, parse=parse_float(0, 100), unit="% of KV blocks",
        help="Without a profile: every engine must be below it for the pool to shrink.",
    )
    encode_scale_up_requests: float = setting(
        env="TANDEM_PLANNER_ENCODE_SCALE_UP_REQUESTS", default=8.0, parse=parse_float(0.1, 1e6), unit="requests",
        help="Requests at one encode worker above which the pool grows. 8: images that a worker reads at a time.",
    )
    encode_scale_down_requests: float = setting(
        env="TANDEM_PLANNER_ENCODE_SCALE_DOWN_REQUESTS", default=4.0, parse=parse_float(0, 1e6), unit="requests",
        help="Every encode worker must be below it for the pool to shrink.",
    )

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft), ("itl", self.itl), ("isl", self.isl), ("osl", self.osl)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}, but must be above 0: set {specs_of(PlannerConfig)[name].env}")
        if self.max_encode and not self.load_scaling:
            raise ConfigError("encode workers are scaled by load only: leave load_scaling on, or set max_encode to 0")
        if 0 < self.max_encode < self.min_encode:
            raise ConfigError(f"min_encode is {self.min_encode} and max_encode {self.max_encode}: raise max_encode or lower min_encode")
        least = sum(self.floor(role) * self.gpus(role) for role in self.roles)
        if self.budget is not None and least > self.budget:
            raise ConfigError(f"the fewest workers need {least} GPUs, but the budget is {self.budget}: "
                              "raise max_gpu_budget or lower min_endpoint")
        if self.load_interval > self.adjustment_interval:
            raise ConfigError(f"load_interval ({self.load_interval:g} s) is beyond adjustment_interval "
                              f"({self.adjustment_interval:g} s): lower it")

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every pool that is scaled; encode workers last, since others can do their work."""
        return (*self.mode.roles, Role.ENCODE) if self.max_encode else self.mode.roles

    @property
    def budget(self) -> int | None:
        """GPUs in all; None for no bound."""
        return None if self.max_gpu_budget == NO_BUDGET else self.max_gpu_budget

    @property
    def ttft_s(self) -> float:
        """Target in seconds."""
        return self.ttft / 1e3

    @property
    def itl_s(self) -> float:
        """Target in seconds."""
        return self.itl / 1e3

    def floor(self, role: Role) -> int:
        """Workers that the pool keeps."""
        own: int | None = {Role.PREFILL: self.min_prefill, Role.DECODE: self.min_decode, Role.ENCODE: self.min_encode}.get(role)
        return self.min_endpoint if own is None else own

    def ceiling(self, role: Role) -> int | None:
        """Workers that the pool has at most; None: the budget alone bounds it."""
        return self.max_encode if role is Role.ENCODE else None

    def gpus(self, role: Role) -> int:
        """GPUs of one engine."""
        own = {Role.PREFILL: self.prefill_engine_num_gpu, Role.ENCODE: self.encode_engine_num_gpu}
        return own.get(role, self.decode_engine_num_gpu)


def load_config(flags: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None) -> PlannerConfig:
    """From flags (by field name, as text), then the environment, then the defaults. Raises ConfigError."""
    specs = specs_of(PlannerConfig)
    merged = dict(os.environ if environ is None else environ)
    for name, text in (flags or {}).items():
        if name not in specs:
            raise ConfigError(f"unknown planner setting {name!r}: known are {', '.join(specs)}")
        merged[specs[name].env] = text
    return resolve(PlannerConfig, {}, merged)
