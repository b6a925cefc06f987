"""bf16 dot products in LLVM's terms: what the compiled loops of CPUs with AVX512-BF16 are made of."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from llvmlite import binding, ir
from numba.core import cgutils

if TYPE_CHECKING:
    from collections.abc import Sequence

LANES = 16  # float32 sums of one vector; it takes as many pairs of bf16


@functools.cache
def has_dot_products() -> bool:
    """Whether this CPU multiplies pairs of bf16, and has no matrix unit (AMX) that oneDNN would use for many rows."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and not features.get("amx-bf16")


@functools.cache
def multiplies_float32_faster() -> bool:
    """Whether this CPU takes longer for many products of bf16 than of float32.

    Intel's bf16 dot products start once in two cycles and float32's twice a cycle, so that without its matrix unit
    (AMX, which a virtual machine may be denied) bf16 is half as fast (benchmarks/linears.py). AMD's Zen 4 is not so.
    """
    return has_dot_products() and not binding.get_host_cpu_name().startswith("znver")


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


HALF, WORD, LONG, FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
SUMS = ir.VectorType(ir.FloatType(), LANES)
PAIRS = ir.VectorType(WORD, LANES)
HALVES = ir.VectorType(HALF, 2 * LANES)
_BF16 = ir.VectorType(_BFloat(), 2 * LANES)


def long(value: int) -> Any:
    """A constant of 64 bits."""
    return ir.Constant(LONG, value)


def zeros() -> Any:
    """Sums before the first product."""
    return ir.Constant(SUMS, [0.0] * LANES)


def times(builder: Any, value: Any, factor: int) -> Any:
    """`value * factor` in 64 bits."""
    return builder.mul(value, long(factor))


def load(builder: Any, at: Any, kind: Any) -> Any:
    """A value of `kind` from an address; vectors need no alignment."""
    return builder.load(builder.inttoptr(at, kind.as_pointer()), align=kind_alignment(kind))


def store(builder: Any, sums: Any, at: Any) -> None:
    """Sums to an address."""
    builder.store(sums, builder.inttoptr(at, SUMS.as_pointer()), align=4)


def kind_alignment(kind: Any) -> int:
    """Bytes that its addresses are multiples of."""
    return 2 if kind == HALVES else 4


def in_all_lanes(builder: Any, word: Any) -> Any:
    """One pair, or one float32, in every lane."""
    vector = ir.VectorType(word.type, LANES)
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, word, ir.Constant(WORD, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(PAIRS, [0] * LANES))


def dot(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    """`sums + left · right`, pair by pair; both are 32 bf16 of any type."""
    function = ir.FunctionType(SUMS, [SUMS, _BF16, _BF16])
    product = cgutils.get_or_insert_function(builder.module, function, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(product, [sums, builder.bitcast(left, _BF16), builder.bitcast(right, _BF16)])


def widened(builder: Any, pairs: Any) -> tuple[Any, Any]:
    """The first and the second of each pair of bf16, as float32."""
    sixteen, upper = (ir.Constant(PAIRS, [value] * LANES) for value in (16, 0xFFFF0000))
    halves = builder.shl(pairs, sixteen), builder.and_(pairs, upper)
    first, second = (builder.bitcast(half, SUMS) for half in halves)
    return first, second


def multiply_add(builder: Any, left: Any, right: Any, sums: Any) -> Any:
    """`left * right + sums`, rounded once."""
    function = ir.FunctionType(SUMS, [SUMS, SUMS, SUMS])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, function, "llvm.fma.v16f32"), [left, right, sums]
    )


def shuffle(builder: Any, left: Any, right: Any, lanes: Sequence[int]) -> Any:
    """`lanes` of `left` followed by `right`."""
    mask = ir.Constant(ir.VectorType(WORD, len(lanes)), list(lanes))
    return builder.shuffle_vector(left, right, mask)


def fetch(builder: Any, at: Any) -> None:
    """Bring a cache line that is read once near; one that is not there does no harm."""
    function = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, WORD, WORD, WORD])
    called = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    read, near, data = (ir.Constant(WORD, value) for value in (0, 2, 1))
    builder.call(called, [builder.inttoptr(at, cgutils.voidptr_t), read, near, data])
