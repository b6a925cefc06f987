"""The ground of the CPU's compiled loops: numba, bf16 as bits, and an exponential that vectorises.

A loop takes plain integers for addresses and sizes, which costs a tenth of what a tensor argument does. Values are
bf16 or float32; bf16 comes as its bits (uint16), is widened on loading and rounded to nearest even on storing, and
every sum is float32. numba keeps what it compiled on disk: seconds on the first start, milliseconds on later ones.
"""

from __future__ import annotations

import threading
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Loop = Any  # a function of integers and floats that returns nothing

MATH = {"reassoc", "contract", "arcp", "nsz"}  # sums may be reordered; infinities and NaN keep their meaning

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)

_starting = threading.Lock()  # one parallel loop at a time: not every threading layer of numba allows two


def serial(loop: Loop) -> Loop:
    """The loop compiled for one thread."""
    return _compiled(loop, parallel=False)


def by_size(loop: Loop, threshold: int, num_threads: int) -> Loop:
    """The loop on one thread where its first argument is below the threshold, on all from there on."""
    alone = serial(loop)
    if num_threads == 1:
        return alone
    # A name of its own: numba's cache on disk does not tell the two compilations of one function apart.
    copy = FunctionType(loop.__code__, loop.__globals__, loop.__name__, loop.__defaults__, loop.__closure__)
    copy.__qualname__ = f"{loop.__qualname__}_on_threads"
    copy.__annotations__ = loop.__annotations__
    together = _compiled(copy, parallel=True)

    def run(size: int, *arguments: Any) -> None:
        if size < threshold:
            alone(size, *arguments)
        else:
            with _starting:
                together(size, *arguments)

    return run


def _compiled(loop: Loop, *, parallel: bool) -> Loop:
    """Now and not on first use, which is somebody's first request."""
    arguments = [name for name in loop.__annotations__ if name != "return"]
    kinds = [types.float64 if loop.__annotations__[name] == "float" else types.int64 for name in arguments]
    options = {"cache": True, "fastmath": MATH, "error_model": "numpy", "nogil": True, "parallel": parallel}
    return njit(types.void(*kinds), **options)(loop)


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Bring the cache line at `address` near; one that is not there does no harm."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, pointer = ir.IntType(32), cgutils.voidptr_t
        function = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        called = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        line = builder.inttoptr(arguments[0], pointer)
        builder.call(
            called, [line, ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)]
        )  # read, keep, data
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic
def load(context: Any, value: Any) -> Any:
    """A stored value as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        wide = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(value), generate


@intrinsic
def stored_as(context: Any, value: Any, like: Any) -> Any:
    """A float32 as it is stored beside `like`: itself, or bf16 bits rounded to nearest even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.return_type == types.float32:
            return arguments[0]
        word = ir.IntType(32)
        raw = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(raw, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(raw, builder.add(odd, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return like(value, like), generate


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """2 ** exponent for an int32 from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        biased = builder.add(arguments[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), generate


@njit(inline="always", fastmath=MATH)
def exp(x: Any) -> Any:
    """e ** x to 2e-7 of its value, in steps that vectorise (Cephes' expf); 0 below -87."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * _LOG2E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    return (y * r * r + r + np.float32(1.0)) * _power_of_two(np.int32(n))
