"""512-bit vectors in compiled kernels, for processors that permute bytes (AVX-512 VBMI).

A loop compiler finds no byte permutations by itself; the functions here emit them.  They run while
a kernel is compiled, take and return LLVM values, and are called by ``intrinsic`` generators only.
Elements are worked on 64 at a time: as ``BYTES``, one vector of codes, or as ``INTS``
or ``FLOATS``, four vectors of 16, the first 16 elements in the first one.

Between the two lies the processor's own order, in which 64 bytes become 4 x 16 integers without
crossing 128-bit lanes: byte 16 l + 4 k + i belongs to element 4 l + i of vector k.  ``transposed``
goes from memory's order to that one, and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba.core import cgutils

BYTES = ir.VectorType(ir.IntType(8), 64)
SHORTS = ir.VectorType(ir.IntType(16), 32)
INTS = ir.VectorType(ir.IntType(32), 16)
FLOATS = ir.VectorType(ir.FloatType(), 16)

#: Elements that are worked on at a time.
GROUP = 64


def aligned(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join arrays of uint8 to one that starts at a cache line."""
    joined = np.concatenate(parts)
    room = np.zeros(joined.size + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + joined.size] = joined
    return room[start : start + joined.size]


def planes(patterns: np.ndarray, used: Sequence[int] = (0, 1, 2, 3)) -> np.ndarray:
    """Return the bytes of uint32 patterns, all lowest ones first; ``used``: which of the four."""
    return np.concatenate([(patterns >> np.uint32(8 * k)).astype(np.uint8) for k in used])


def pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Return the address of an array's first byte."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(data, ir.IntType(8).as_pointer())


def read(builder: Any, base: Any, kind: Any, offset: int) -> Any:
    """Load one vector, ``offset`` bytes behind an address; any alignment."""
    address = builder.gep(base, [ir.Constant(ir.IntType(32), offset)])
    value = builder.load(builder.bitcast(address, kind.as_pointer()))
    value.align = 1
    return value


def write(builder: Any, value: Any, base: Any, offset: int) -> None:
    """Store one vector, ``offset`` bytes behind an address; any alignment."""
    address = builder.gep(base, [ir.Constant(ir.IntType(32), offset)])
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = 1


def splat(kind: Any, number: float) -> Any:
    """Return a constant vector of equal elements."""
    return ir.Constant(kind, [number] * kind.count)


def spread(builder: Any, kind: Any, value: Any) -> Any:
    """Return a vector of copies of a run-time number."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return shuffle(builder, first, nothing, [0] * kind.count)


def call(builder: Any, name: str, kind: Any, arguments: Sequence[Any]) -> Any:
    """Call an LLVM intrinsic that returns ``kind``."""
    signature = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def shuffle(builder: Any, a: Any, b: Any, order: Sequence[int]) -> Any:
    """Pick elements of two vectors; those of the second are counted on."""
    indices = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order))
    return builder.shuffle_vector(a, b, indices)


def transposed(builder: Any, codes: Any) -> Any:
    """Turn bytes from memory's order to the processor's, or back."""
    fours = builder.bitcast(codes, INTS)
    order = [4 * (p % 4) + p // 4 for p in range(16)]
    return builder.bitcast(shuffle(builder, fours, fours, order), BYTES)


def high_halves(builder: Any, a: Any, b: Any) -> Any:
    """Pick the odd elements of two vectors, those of ``a`` first in every 128-bit lane."""
    return _halves(builder, a, b, 1)


def _halves(builder: Any, a: Any, b: Any, odd: int) -> Any:
    lane = a.type.count // 4
    order = [
        source * a.type.count + block * lane + 2 * i + odd
        for block in range(4)
        for source in range(2)
        for i in range(lane // 2)
    ]
    return shuffle(builder, a, b, order)


def _interleaved(builder: Any, a: Any, b: Any, high: int) -> Any:
    """Interleave the low or high halves of two vectors' 128-bit lanes."""
    lane = a.type.count // 4
    order = [
        source * a.type.count + block * lane + high * (lane // 2) + i
        for block in range(4)
        for i in range(lane // 2)
        for source in range(2)
    ]
    return shuffle(builder, a, b, order)


def widened(builder: Any, parts: Sequence[Any]) -> list[Any]:
    """Turn four ``BYTES`` in the processor's order, lowest bytes first, into four ``INTS``."""
    first, second = (
        [builder.bitcast(_interleaved(builder, a, b, high), SHORTS) for high in (0, 1)]
        for a, b in (parts[:2], parts[2:])
    )
    return [
        builder.bitcast(_interleaved(builder, first[k // 2], second[k // 2], k % 2), INTS)
        for k in range(4)
    ]


def narrowed(builder: Any, values: Sequence[Any]) -> Any:
    """Turn four ``INTS`` into ``BYTES`` of their lowest bytes, in the processor's order."""
    shorts = [builder.bitcast(value, SHORTS) for value in values]
    words = [_halves(builder, shorts[k], shorts[k + 1], 0) for k in (0, 2)]
    return _halves(builder, *(builder.bitcast(word, BYTES) for word in words), 0)


def signs(builder: Any, values: Sequence[Any]) -> Any:
    """Turn four ``INTS`` into ``BYTES`` of the same signs, in the processor's order."""
    halves = [
        call(builder, "llvm.x86.avx512.packssdw.512", SHORTS, values[k : k + 2]) for k in (0, 2)
    ]
    return call(builder, "llvm.x86.avx512.packsswb.512", BYTES, halves)


def negative(builder: Any, codes: Any) -> Any:
    """Return the mask of bytes whose sign bit is set."""
    return builder.icmp_signed("<", codes, splat(BYTES, 0))


def read_tables(builder: Any, base: Any, offset: int, entries: int, count: int) -> list[list[Any]]:
    """Load ``count`` tables of 128 or 256 bytes, one behind the other."""
    return [
        [
            read(builder, base, BYTES, offset + entries * k + 64 * part)
            for part in range(entries // 64)
        ]
        for k in range(count)
    ]


def look_up(builder: Any, table: Sequence[Any], indices: Any) -> Any:
    """Pick 64 bytes of a table of 128 or 256."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    low = call(builder, name, BYTES, [table[0], indices, table[1]])
    if len(table) == 2:
        return low
    high = call(builder, name, BYTES, [table[2], indices, table[3]])
    return builder.select(negative(builder, indices), high, low)


def look_up_short(builder: Any, table: Any, indices: Any) -> Any:
    """Pick 32 numbers of 16 bits of a table of 32, by the low five bits of the indices."""
    return call(builder, "llvm.x86.avx512.permvar.hi.512", SHORTS, [table, indices])


def decode(builder: Any, tables: Sequence[Any], codes: Any, values: Any, elements: int) -> None:
    """Write the fp32 values of codes; the tables hold their upper two bytes, or all four."""
    zeros = [splat(BYTES, 0)] * (4 - len(tables))
    for start in range(0, elements, GROUP):
        indices = transposed(builder, read(builder, codes, BYTES, start))
        found = zeros + [look_up(builder, table, indices) for table in tables]
        for k, value in enumerate(widened(builder, found)):
            write(builder, value, values, 4 * start + 64 * k)
