# SPDX-License-Identifier: Apache-2.0
"""What an engine can do, as measured: files in the names, folders and units of Dynamo's profiler, so that each reads the other's.

    DIR/selected_prefill_interpolation/raw_data.npz   prefill_isl (tokens), prefill_ttft (ms), prefill_thpt_per_gpu (tokens/s/GPU)
    DIR/selected_decode_interpolation/raw_data.npz    x_kv_usage (0 to 1), y_context_length (tokens), z_itl (ms),
                                                      z_thpt_per_gpu (tokens/s/GPU), max_kv_tokens (of one engine)
    DIR/prefill_raw_data.json, DIR/decode_raw_data.json   the same keys with lists, read where there is no npz
"""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tandem_protocol.durable import replace_file
from tandem_protocol.errors import ConfigError

Floats = NDArray[np.float64]
PREFILL_NPZ, DECODE_NPZ = Path("selected_prefill_interpolation/raw_data.npz"), Path("selected_decode_interpolation/raw_data.npz")
PREFILL_JSON, DECODE_JSON = Path("prefill_raw_data.json"), Path("decode_raw_data.json")
_PREFILL_KEYS = ("prefill_isl", "prefill_ttft", "prefill_thpt_per_gpu")
_DECODE_KEYS = ("x_kv_usage", "y_context_length", "z_itl", "z_thpt_per_gpu")
MAX_POINTS = 100_000
T = TypeVar("T")


@dataclass(frozen=True)
class PrefillPoints:
    """One prompt at a time; arrays of shape (n,), n >= 1, in the order of `isl`."""

    isl: Floats
    """Tokens."""
    ttft_ms: Floats
    thpt_per_gpu: Floats
    """Prompt tokens per second and GPU."""

    def __post_init__(self) -> None:
        _check((self.isl, self.ttft_ms, self.thpt_per_gpu), _PREFILL_KEYS)


@dataclass(frozen=True)
class DecodePoints:
    """Steady batches; arrays of shape (n,), n >= 1, in any order."""

    kv_usage: Floats
    """Of an engine's KV blocks: 0 to 1."""
    context_length: Floats
    """Tokens per request, mean over its generation."""
    itl_ms: Floats
    thpt_per_gpu: Floats
    """Generated tokens per second and GPU."""
    max_kv_tokens: float
    """That one engine's KV cache holds."""

    def __post_init__(self) -> None:
        _check((self.kv_usage, self.context_length, self.itl_ms, self.thpt_per_gpu), _DECODE_KEYS)
        if float(self.kv_usage.max()) > 1.5:
            raise ConfigError(f"x_kv_usage goes up to {self.kv_usage.max():g}: it is a share, from 0 to 1")
        if not (np.isfinite(self.max_kv_tokens) and self.max_kv_tokens > 0):
            raise ConfigError(f"max_kv_tokens is {self.max_kv_tokens}: give the tokens that one engine's KV cache holds")


@dataclass(frozen=True)
class Profile:
    """One engine per role. A role that was not profiled is None."""

    prefill: PrefillPoints | None = None
    decode: DecodePoints | None = None


def read_profile(folder: Path) -> Profile:
    """Reads whatever of the two there is. Raises ConfigError for a folder without any, and for malformed files."""
    prefill = _read(folder, PREFILL_NPZ, PREFILL_JSON, _prefill_of)
    decode = _read(folder, DECODE_NPZ, DECODE_JSON, _decode_of)
    if prefill is None and decode is None:
        raise ConfigError(f"{folder} holds no profile: expected {PREFILL_NPZ} and {DECODE_NPZ}, as `tandem profile` writes them")
    return Profile(prefill, decode)


def write_profile(profile: Profile, folder: Path) -> None:
    """Writes npz and JSON, making the folder. A file appears whole or not at all."""
    if profile.prefill is not None:
        one = profile.prefill
        _write(folder, PREFILL_NPZ, PREFILL_JSON, dict(zip(_PREFILL_KEYS, (one.isl, one.ttft_ms, one.thpt_per_gpu), strict=True)))
    if profile.decode is not None:
        two = profile.decode
        arrays = dict(zip(_DECODE_KEYS, (two.kv_usage, two.context_length, two.itl_ms, two.thpt_per_gpu), strict=True))
        _write(folder, DECODE_NPZ, DECODE_JSON, {**arrays, "max_kv_tokens": np.array([two.max_kv_tokens])})


def _prefill_of(arrays: Mapping[str, Floats]) -> PrefillPoints:
    _check([arrays[key] for key in _PREFILL_KEYS], _PREFILL_KEYS)
    order = np.argsort(arrays["prefill_isl"], kind="stable")
    return PrefillPoints(*(arrays[key][order] for key in _PREFILL_KEYS))


def _decode_of(arrays: Mapping[str, Floats]) -> DecodePoints:
    capacity = arrays["max_kv_tokens"]
    usage, context, itl, throughput = (arrays[key] for key in _DECODE_KEYS)
    return DecodePoints(usage, context, itl, throughput, float(capacity[0]) if capacity.size else 0.0)


def _read(folder: Path, npz: Path, text: Path, build: Callable[[Mapping[str, Floats]], T]) -> T | None:
    for path, load in ((folder / npz, _load_npz), (folder / text, _load_json)):
        if path.is_file():
            try:
                return build(_Arrays(load(path)))
            except ConfigError as exc:
                raise ConfigError(f"{path}: {exc}") from exc
    return None


class _Arrays(dict[str, Any]):
    """The arrays of a file by name, as floats of one dimension; what is missing or no numbers is a ConfigError."""

    def __getitem__(self, key: str) -> Floats:
        try:
            return np.atleast_1d(np.asarray(super().__getitem__(key), np.float64)).ravel()
        except KeyError as exc:
            raise ConfigError(f"{key} is missing: measure again with `tandem profile`") from exc
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"{key} is not a list of numbers") from exc


def _load_npz(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise ConfigError(f"can't be read as npz ({exc}): measure again with `tandem profile`") from exc


def _load_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"can't be read as JSON ({exc})") from exc
    if not isinstance(data, dict):
        raise ConfigError("is not a JSON object of lists")
    return data


def _write(folder: Path, npz: Path, text: Path, arrays: Mapping[str, Floats]) -> None:
    packed = io.BytesIO()
    np.savez(packed, **dict(arrays))
    replace_file(folder / npz, packed.getvalue())
    lists = {name: array.tolist() for name, array in arrays.items()}
    replace_file(folder / text, (json.dumps(lists, indent=1) + "\n").encode())


def _check(arrays: tuple[Floats, ...] | list[Floats], names: tuple[str, ...]) -> None:
    """Refuses what no engine can have given."""
    for array, name in zip(arrays, names, strict=True):
        if not 1 <= array.size <= MAX_POINTS or array.size != arrays[0].size:
            raise ConfigError(f"{name} has {array.size} points and {names[0]} {arrays[0].size}: "
                              f"each needs the same number, 1 to {MAX_POINTS}")
        wrong = array[~(np.isfinite(array) & (array > 0))]
        if wrong.size and not (name == "x_kv_usage" and np.isfinite(wrong).all() and (wrong >= 0).all()):
            raise ConfigError(f"{name} holds {wrong[0]}: every figure must be finite and above 0")
