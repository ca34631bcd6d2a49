# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: whether its configuration can work, what of it prefill and decode must share, and how many guesses come true.

Pure. What is checked here fails in milliseconds with a sentence instead of after half a minute of engine start; what only vLLM knows
(vocabularies, tensor parallelism of the draft, attention backends) it says itself.
"""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tandem_protocol.errors import ConfigError

MAX_TOKENS = 128
"""Guesses at once that vLLM's rejection sampler has room for (`MAX_SPEC_LEN`)."""
_SHORTHANDS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
_NGRAM = frozenset({"ngram", "ngram_gpu"})
_NEED_DRAFT = frozenset({"draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "dflash"})
_NEED_TOKENS = _NGRAM | {"draft_model", "eagle", "eagle3", "medusa"}
"""Methods whose number of guesses no checkpoint tells."""
_SHARED = ("model", "revision", "num_speculative_tokens", "parallel_drafting", "kv_cache_dtype", "prompt_lookup_min", "prompt_lookup_max")
_HALF_LIFE_DRAFTS = 2000
"""After so many guesses an old one counts half."""


def check_speculation(arguments: Mapping[str, Any], methods: Collection[str] = ()) -> None:
    """Raises ConfigError for a configuration that can't work; `arguments` are engine arguments, `methods` those that vLLM has."""
    config = _merged(arguments)
    if config is None:
        return
    method = _method(config, methods)
    _check_count(config, "num_speculative_tokens", required=method in _NEED_TOKENS, most=MAX_TOKENS)
    if method in _NGRAM:
        _check_lookup(config)
    if method in _NEED_DRAFT or config.get("model"):
        _check_draft(config, method)
    size, own = arguments.get("tensor_parallel_size") or 1, config.get("draft_tensor_parallel_size")
    if own is not None and own not in (1, size):
        raise ConfigError(f"draft_tensor_parallel_size {own!r} does not work: use 1 or the target's tensor_parallel_size, {size}")


def _merged(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration with vLLM's shorthands; None without speculation."""
    given = arguments.get("speculative_config")
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"speculative_config must be a JSON object, like {{\"method\": \"ngram\", ...}}, and is {given!r}")
    config = {str(name).replace("-", "_"): value for name, value in (given or {}).items()}
    for shorthand, name in _SHORTHANDS.items():
        value = arguments.get(shorthand)
        if value is not None and name in config:
            raise ConfigError(f"{shorthand} and {name} of speculative_config say the same: give one of them")
        if value is not None:
            config[name] = value
    return config if given is not None or config else None


def _method(config: Mapping[str, Any], methods: Collection[str]) -> str:
    """As vLLM infers it; empty where a checkpoint's own files decide."""
    method = config.get("method")
    if method is None:
        if not config.get("model"):
            raise ConfigError("speculative_config names neither method nor model: add \"method\", for example ngram or draft_model")
        return "ngram" if config["model"] in ("ngram", "[ngram]") else ""
    if methods and method not in methods:
        close = difflib.get_close_matches(str(method), methods, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(sorted(methods))}"
        raise ConfigError(f"unknown speculative method {method!r}: {hint}")
    return str(method)


def _check_count(config: Mapping[str, Any], name: str, *, required: bool = False, most: int | None = None) -> None:
    value = config.get(name)
    bounds = f"from 1 to {most}" if most else "of at least 1"
    if value is None:
        if required:
            raise ConfigError(f"speculative_config lacks {name}: give how many tokens are guessed at once, a whole number {bounds}")
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        raise ConfigError(f"{name} {value!r} of speculative_config does not work: use a whole number {bounds}")


def _check_lookup(config: Mapping[str, Any]) -> None:
    for name in ("prompt_lookup_min", "prompt_lookup_max"):
        _check_count(config, name)
    least, most = config.get("prompt_lookup_min"), config.get("prompt_lookup_max")
    if least is not None and most is not None and least > most:
        raise ConfigError(f"prompt_lookup_min {least} is more than prompt_lookup_max {most}: lower it, or raise the other")


def _check_draft(config: Mapping[str, Any], method: str) -> None:
    model = config.get("model")
    if not model:
        raise ConfigError(f"the speculative method {method!r} needs a draft: add \"model\", a folder or a hub id like org/name")
    if not isinstance(model, str):
        raise ConfigError(f"model {model!r} of speculative_config is no name: give a folder, or a hub id like org/name")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError(f"the draft model {model} has no config.json: give the folder of a Hugging Face model")
    elif path.is_absolute() or model.startswith((".", "~")):
        raise ConfigError(f"there is no draft model {model}: give an existing folder, or a hub id like org/name")


def speculation_of(config: Any) -> str:
    """What prefill and decode must share, of vLLM's resolved SpeculativeConfig; empty without speculation.

    A draft's KV blocks travel with the target's, so that another draft, or none, has other blocks.
    """
    if config is None:
        return ""
    shared = {name: getattr(config, name, None) for name in _SHARED}
    details = [f"{name}={value}" for name, value in shared.items() if value not in (None, False, 0) and value != config.method]
    return f"{config.method}({', '.join(details)})"


def padded(refused: int, begun: int, computed: int) -> int:
    """How many of a step's wholly `refused` guesses nobody made.

    The first step of a request whose prompt is there already (a handoff) has one token to compute. vLLM pads it to the size of a guess,
    for its CUDA graphs, and counts that as one (`Scheduler.schedule`, `pad_spec_decode`). `begun` requests got their first token in this
    step, for which `computed` prompt tokens were computed in all. If that is more than one each, some had a prompt to compute: then none
    is told apart, and all count.
    """
    return min(begun, refused) if computed <= begun else 0


class Acceptance:
    """How many tokens a guess brings, of late: without padding, which vLLM's counters hold, and without the lag of Prometheus' rates."""

    def __init__(self) -> None:
        self._drafts = self._accepted = 0.0

    def record(self, drafts: int, accepted: int) -> None:
        """So many guesses, of which so many tokens were accepted."""
        keep = 0.5 ** (drafts / _HALF_LIFE_DRAFTS)
        self._drafts = keep * self._drafts + drafts
        self._accepted = keep * self._accepted + accepted

    @property
    def length(self) -> float | None:
        """Tokens per guess, with the one that the target adds; None before the first guess."""
        return 1.0 + self._accepted / self._drafts if self._drafts else None
