# SPDX-License-Identifier: Apache-2.0
"""The planner: observations in, decisions out; no clock, no I/O. Not thread-safe: one loop calls it.

`decide` may be called at any pace. Each call is a look at the load; whenever an adjustment interval has passed and there is traffic, it is
also a plan from the traffic, which holds until the next. So a loop that calls every few seconds has both, and one that calls once per
interval has the throughput plan with a glance at the load.
"""

from collections.abc import Mapping

from tandem_planner.budget import Ask, within_budget
from tandem_planner.capacity import Capacity, Demand
from tandem_planner.config import PlannerConfig
from tandem_planner.load_plan import LoadVerdict, look, thresholds
from tandem_planner.predict.forecast import Forecaster, TrafficHistory
from tandem_planner.profile_data import Profile
from tandem_planner.sla_plan import SlaModel, Targets
from tandem_planner.stability import Wish, after_plan, decided, lesson_floor, seen, wish
from tandem_planner.state import PlannerState, changed
from tandem_planner.targets import check_targets
from tandem_planner.terms import Decision, Observation, Pool, Term
from tandem_planner.throughput import due, lapsed, model_for, planned
from tandem_protocol.errors import ConfigError
from tandem_protocol.roles import Role

NO_VERDICT = LoadVerdict(needed=None, least=None)


class Planner:
    """Decides how many workers each pool of its mode should have.

    Raises ConfigError if the profile can't keep the targets (`check_targets`), or if neither traffic nor load may decide.
    """

    def __init__(self, config: PlannerConfig, profile: Profile | None, state: PlannerState | None = None) -> None:
        if not config.load_scaling and (profile is None or not config.throughput_scaling):
            raise ConfigError("nothing can decide: give a profile (profile_results_dir) or leave load_scaling on")
        self._config = config
        self._model = SlaModel(Capacity.of(profile), Targets.of(config), config.prefill_engine_num_gpu, config.decode_engine_num_gpu)
        if profile is not None and config.throughput_scaling:
            check_targets(config, self._model.capacity)
        self._forecaster = Forecaster(config)
        self._state = state or PlannerState()

    @property
    def state(self) -> PlannerState:
        """What a restarted planner is to be given, so that it goes on without a jump."""
        return self._state

    def warm_up(self, history: TrafficHistory) -> None:
        """Takes a past (`predict.warmup`) unless there is one of its own already."""
        if not self._state.history.requests_per_s:
            self._state = changed(self._state, history=history)

    def decide(self, observation: Observation) -> Decision:
        """How many workers each pool should have. A pool that could not be read keeps what was last decided for it, if anything was."""
        state, terms = self._told(observation), tuple[Term, ...]()
        if due(self._config, state, observation):
            state, terms = planned(self._config, self._model, self._forecaster, state, observation)
            for role in self._config.mode.roles:
                state = state.with_role(role, after_plan(state.of(role), self._config, observation.at_s, state.requests_per_s))
        else:
            state = lapsed(self._config, state, observation.at_s)
        wishes: dict[Role, Wish] = {}
        for role, pool in self._pools(observation).items():
            state, wishes[role], more = self._wish(role, pool, state, observation.at_s)
            terms += more
        state, granted = self._granted(state, observation, wishes)
        self._state = state
        return Decision(observation.at_s, granted, self._reason(observation, wishes, granted), terms + self._result_terms(wishes, granted))

    def _pools(self, observation: Observation) -> dict[Role, Pool]:
        return {role: observation.pools[role] for role in self._config.roles if role in observation.pools}

    def _told(self, observation: Observation) -> PlannerState:
        state = self._state
        for role, pool in self._pools(observation).items():
            state = state.with_role(role, seen(state.of(role), pool, observation.at_s))
        return state

    def _wish(self, role: Role, pool: Pool, state: PlannerState, at_s: float) -> tuple[PlannerState, Wish, tuple[Term, ...]]:
        role_state, verdict = state.of(role), NO_VERDICT
        if self._config.load_scaling:
            model = model_for(self._model, role, role_state)
            bounds = thresholds(role, self._config, model, self._lengths(state))
            role_state, verdict = look(role, role_state, pool, bounds, self._config, at_s)
        found = wish(role, role_state, pool, verdict, self._config, at_s, state.requests_per_s)
        terms = verdict.terms
        if kept := lesson_floor(role_state, self._config, at_s, state.requests_per_s):
            terms += (Term("lesson", kept, f"{kept - 1} were too few at such traffic", role),)
        return state.with_role(role, role_state), found, terms

    def _lengths(self, state: PlannerState) -> Demand:
        """Prompt and answer lengths for the load's thresholds: as seen last, else as configured."""
        return Demand(1.0, max(1.0, state.isl or self._config.isl), max(1.0, state.osl or self._config.osl))

    def _granted(self, state: PlannerState, observation: Observation, wishes: Mapping[Role, Wish]) -> tuple[PlannerState, dict[Role, int]]:
        """After the budget. A pool that can't be read counts with what it was last told, and gets no more."""
        asks = {role: Ask(one.workers, self._config.gpus(role), self._config.floor(role)) for role, one in wishes.items()}
        unread = {role: last for role in self._config.roles if role not in wishes and (last := state.of(role).target) is not None}
        held = sum(workers * self._config.gpus(role) for role, workers in unread.items())
        least = sum(ask.floor * ask.gpus for ask in asks.values())
        budget = None if self._config.budget is None else max(least, self._config.budget - held)
        granted = within_budget(asks, budget)
        for role, workers in granted.items():
            pool = observation.pools[role]
            state = state.with_role(role, decided(state.of(role), pool, wishes[role].workers, workers, self._config,
                                                  observation.at_s, state.requests_per_s))
        return state, {**granted, **unread}

    def _result_terms(self, wishes: Mapping[Role, Wish], granted: Mapping[Role, int]) -> tuple[Term, ...]:
        terms = tuple(Term("wanted", one.workers, one.why, role) for role, one in wishes.items())
        used = sum(workers * self._config.gpus(role) for role, workers in granted.items())
        bound = "no budget" if self._config.budget is None else f"of a budget of {self._config.budget}"
        targets = (Term("target", workers, "within the budget", role) for role, workers in granted.items())
        return (*terms, *targets, Term("gpus", used, bound))

    def _reason(self, observation: Observation, wishes: Mapping[Role, Wish], granted: Mapping[Role, int]) -> str:
        phrases = [_phrase(role, wishes.get(role), observation.pools.get(role), workers) for role, workers in granted.items()]
        return "; ".join(phrases) or "no pool could be read: nothing changes"


def _phrase(role: Role, asked: Wish | None, pool: Pool | None, workers: int) -> str:
    if asked is None or pool is None:
        return f"{role.value} stays at {workers}: it could not be read"
    cut = f" ({asked.workers} wanted, but the budget is used up)" if workers < asked.workers else ""
    if workers == pool.wanted:
        return f"{role.value} stays at {workers}{cut}" + (": " + asked.why if asked.workers == workers and asked.why != "as it is" else "")
    return f"{role.value} {pool.wanted} -> {workers}: {asked.why}{cut}"
