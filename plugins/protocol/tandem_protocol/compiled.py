# SPDX-License-Identifier: Apache-2.0
"""numba with types: compiled functions keep their annotations, and the settings are the same everywhere.

Compiled functions release the GIL and are cached on disk. Integers in them are np.uint64 throughout: numba turns
uint64 mixed with int64 into float64.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # numba's own, without stubs
from numba.extending import intrinsic
from numpy.typing import NDArray

Int = Any
"""A machine integer inside compiled functions: numba checks how they mix, mypy can't."""

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """The function, compiled at its first call for the types of that call."""
    return cast(_F, numba.njit(nogil=True, cache=True, boundscheck=False)(function))


def inlined(function: _F) -> _F:
    """A small function that only compiled functions call."""
    return cast(_F, numba.njit(nogil=True, forceinline=True, cache=True, boundscheck=False)(function))


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: numba compiles once more for the other kind, so that all that comes from outside is made the same."""
    view = array.view()
    view.flags.writeable = False
    return view


def _fold_multiply(_context: Any, left: Any, right: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], wide), builder.zext(arguments[1], wide))
        high = builder.lshr(product, ir.Constant(wide, 64))
        return builder.trunc(builder.xor(product, high), ir.IntType(64))

    return numba.types.uint64(left, right), emit


fold_multiply: Callable[[np.uint64, np.uint64], np.uint64] = intrinsic(_fold_multiply)
"""64 x 64 -> 128 bit product, upper half xor lower half: the step of wyhash. Callable from compiled functions only."""


def _prefetch(_context: Any, address: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = builder.module.globals.get("llvm.prefetch.p0i8") or ir.Function(builder.module, kind, "llvm.prefetch.p0i8")
        location = builder.inttoptr(arguments[0], pointer)
        builder.call(function, [location, ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)])
        return ir.Constant(ir.IntType(64), 0)

    return numba.types.uint64(address), emit


prefetch: Callable[[np.uint64], np.uint64] = intrinsic(_prefetch)
"""Asks the processor to load the cache line of an address; never faults. Callable from compiled functions only."""


def _pointer(_context: Any, address: Any) -> Any:
    word = numba.types.uint64

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())

    return numba.types.CPointer(word)(address), emit


_words: Callable[[Int], Any] = intrinsic(_pointer)


@inlined
def words_at(address: Int, count: Int) -> NDArray[np.uint64]:
    """The array of `count` words at an address: whoever gave it away (`array.ctypes.data`) keeps the array alive meanwhile.

    An argument that is an array costs a call from Python 0.1 us, and an integer next to nothing.
    """
    array: NDArray[np.uint64] = numba.carray(_words(address), (np.int64(count),))
    return array


@inlined
def grid_at(address: Int, rows: Int, columns: Int) -> NDArray[np.uint64]:
    """As `words_at`, for an array of two dimensions."""
    array: NDArray[np.uint64] = numba.carray(_words(address), (np.int64(rows), np.int64(columns)))
    return array


def _load_big_endian(bits: int) -> Callable[[np.uint64], np.uint64]:
    def load(_context: Any, address: Any) -> Any:
        def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            word = ir.IntType(bits)
            value = builder.load(builder.inttoptr(arguments[0], word.as_pointer()), align=1)
            return builder.zext(builder.bswap(value), ir.IntType(64)) if bits < 64 else builder.bswap(value)

        return numba.types.uint64(address), emit

    return cast(Callable[[np.uint64], np.uint64], intrinsic(load))


load_u32_big_endian = _load_big_endian(32)
"""Four unaligned bytes at an address (`array.ctypes.data` + offset); the caller has checked the bounds."""
load_u64_big_endian = _load_big_endian(64)
"""Eight of them."""


def _load(_context: Any, address: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()), align=1)

    return numba.types.uint64(address), emit


load_u64: Callable[[np.uint64], np.uint64] = intrinsic(_load)
"""Eight of them in the machine's own order."""


def _trailing_zeros(_context: Any, word: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return numba.types.uint64(word), emit


trailing_zeros: Callable[[np.uint64], np.uint64] = intrinsic(_trailing_zeros)
"""Position of the lowest bit that is set; 64 for 0. Callable from compiled functions only."""
