"""The dynamic map's codes 64 at a time, by byte permutations (``vectors``).

Decoding picks each of a float's four bytes from a table of 256.  Encoding estimates a code from
the upper 16 bits of a value, by integer arithmetic that is never too high and at most one too
low, then compares the value itself with the middle above the estimated code, picked from a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from .vectors import (
    BYTES,
    FLOATS,
    GROUP,
    INTS,
    SHORTS,
    aligned,
    call,
    decode,
    high_halves,
    look_up,
    look_up_short,
    negative,
    planes,
    pointer,
    read,
    read_tables,
    signs,
    splat,
    spread,
    transposed,
    widened,
    write,
)

#: Elements of a row: a block.
ROW = 256

#: The estimate is lowered by this part of an interval between codes.  At a decade's first value,
#: the middle lies 0.2 above the decade's edge; upper 16 bits are up to 0.56 too low.
LOWERED = 0.3

#: Where the tables lie: four planes of 256 bytes of values, then four of 128 or 256 of middles,
#: each with three tables of 32 numbers of 16 bits.
_SIGNED_VALUES, _POSITIVE_VALUES, _SIGNED_MIDDLES = 0, 1024, 2048
_POSITIVE_MIDDLES = _SIGNED_MIDDLES + 4 * 128 + 3 * 64


def lane_tables(values: Sequence[np.ndarray], middles: Sequence[np.ndarray]) -> np.ndarray:
    """Return what compiled code looks up, as one array of bytes.

    The maps' fp32 values and the middles between those that are not negative, of the signed map
    and of the positive one.
    """
    return aligned(
        [planes(of_map.view(np.uint32)) for of_map in values]
        + [
            _encoding(of_map, signed=signed)
            for of_map, signed in zip(middles, (True, False), strict=True)
        ]
    )


def _encoding(middles: np.ndarray, *, signed: bool) -> np.ndarray:
    """Return an encoder's tables.

    After the middles' bytes come three tables of 16 bits: what to add to the upper half of a
    value so that its upper nine bits count the line it is on, a binade of a decade; and that
    line's slope and start.
    """
    entries = 128 if signed else 256
    patterns = np.zeros(entries, np.uint32)
    patterns[: middles.shape[0]] = middles.view(np.uint32)
    if not signed:
        patterns[0] = 0  # A value that is not zero never gets code 0.
    to_line, slope, start = (np.zeros(32, np.int64) for _ in range(3))
    first, line = (1 if signed else 2), 0
    edges = [10.0 ** (decade - 7) for decade in range(7)]
    for binade in range(32):
        lowest = 2.0 ** (binade - 31)
        within = [decade for decade in range(7) if lowest < edges[decade] < 2 * lowest]
        below = max((decade for decade in range(7) if edges[decade] <= lowest), default=-1)
        decades = [] if below < 0 else [below]
        switch = 127  # the last mantissa, of seven bits, before the next decade's line
        to_line[binade] = line + len(decades)
        if within:
            decades.append(within[0])
            switch = int((edges[within[0]] / lowest - 1) * 128)
        to_line[binade] = (to_line[binade] << 7) + (127 - switch) - ((96 + binade) << 7)
        for decade in decades:
            line += 1
            count = first << decade
            width = 0.9 * 10.0 ** (decade - 6) / count
            begin = (lowest - edges[decade]) / width + count - (first - 1) - LOWERED
            slope[line], start[line] = round(256 * lowest / width), round(256 * begin)
    # One, and what rounding leaves above it, is on the last line, which is level.
    slope[line], start[line] = 0, 256 * (middles.shape[0] - 1)
    assert line == 31 and min(slope.min(), start.min()) >= 0, "32 lines, none of them negative"
    shorts = (to_line & 0xFFFF, slope, start)
    parts = [planes(patterns), *(short.astype(np.uint16).view(np.uint8) for short in shorts)]
    return np.concatenate(parts)


def _decoder(signed: bool) -> Callable[..., Any]:
    """Return the generator of one decoder."""
    offset = _SIGNED_VALUES if signed else _POSITIVE_VALUES

    def type_decoder(typing_context: Any, codes: Any, tables: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, base, target = (
                pointer(context, builder, kind, array)
                for kind, array in zip(signature.args, arguments, strict=True)
            )
            planes_of_values = read_tables(builder, base, offset, 256, 4)
            decode(builder, planes_of_values, source, target, ROW)
            return context.get_dummy_value()

        return types.void(codes, tables, values), generate

    return type_decoder


#: Compiled code calls these with contiguous rows of 256: codes, ``lane_tables``, values.
decode_signed_row: Any = intrinsic(_decoder(signed=True))
decode_positive_row: Any = intrinsic(_decoder(signed=False))


def _estimated(builder: Any, keys: list[Any], lines: list[Any]) -> Any:
    """Return the codes (``BYTES``, the processor's order) at or one below those of the keys."""
    to_line, slope, start = lines
    places = []
    for a, b in (keys[:2], keys[2:]):
        upper = high_halves(builder, builder.bitcast(a, SHORTS), builder.bitcast(b, SHORTS))
        upper = call(builder, "llvm.umax.v32i16", SHORTS, [upper, splat(SHORTS, 96 << 7)])
        seven = splat(SHORTS, 7)
        binade = builder.lshr(upper, seven)
        line = builder.lshr(builder.add(upper, look_up_short(builder, to_line, binade)), seven)
        mantissa = builder.shl(upper, splat(SHORTS, 9))
        rise = [mantissa, look_up_short(builder, slope, line)]
        place = call(builder, "llvm.x86.avx512.pmulhu.w.512", SHORTS, rise)
        place = builder.add(place, look_up_short(builder, start, line))
        places.append(builder.bitcast(place, BYTES))
    return high_halves(builder, places[0], places[1])


def _encoder(signed: bool) -> Callable[..., Any]:
    """Return the generator of one encoder."""
    entries = 128 if signed else 256
    offset = _SIGNED_MIDDLES if signed else _POSITIVE_MIDDLES

    def type_encoder(typing_context: Any, values: Any, factor: Any, tables: Any, codes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, base, target = (
                pointer(context, builder, signature.args[k], arguments[k]) for k in (0, 2, 3)
            )
            scale = spread(builder, FLOATS, arguments[1])
            middles = read_tables(builder, base, offset, entries, 4)
            after = offset + 4 * entries
            lines = [read(builder, base, SHORTS, after + 64 * k) for k in range(3)]
            for group in range(0, ROW, GROUP):
                values = [read(builder, source, FLOATS, 4 * group + 64 * k) for k in range(4)]
                scaled = [builder.bitcast(builder.fmul(x, scale), INTS) for x in values]
                key = _signed_key if signed else _positive_key
                keys = [key(builder, x, y) for x, y in zip(values, scaled, strict=True)]
                guess = _estimated(builder, keys, lines)
                above = widened(builder, [look_up(builder, table, guess) for table in middles])
                beyond = signs(
                    builder, [builder.sub(m, k) for m, k in zip(above, keys, strict=True)]
                )
                rank = builder.sub(guess, builder.sext(negative(builder, beyond), BYTES))
                if signed:
                    rank = _signed_code(builder, rank, signs(builder, scaled))
                write(builder, transposed(builder, rank), target, group)
            return context.get_dummy_value()

        return types.void(values, factor, tables, codes), generate

    return type_encoder


def _signed_key(builder: Any, value: Any, scaled: Any) -> Any:
    """Return the magnitude's bits, one more if negative: ties go to the lower value."""
    # The sum wraps to the magnitude plus one if negative; otherwise it is the larger of the two.
    wrapped = builder.add(scaled, splat(INTS, 0x80000001))
    return call(builder, "llvm.umin.v16i32", INTS, [scaled, wrapped])


def _positive_key(builder: Any, value: Any, scaled: Any) -> Any:
    """Return the bits, at least one if the value is not zero, which scaling may have made it."""
    least = [builder.bitcast(value, INTS), splat(INTS, 1)]
    some = call(builder, "llvm.umin.v16i32", INTS, least)
    return call(builder, "llvm.umax.v16i32", INTS, [scaled, some])


def _signed_code(builder: Any, rank: Any, sign: Any) -> Any:
    """Return 127 plus or minus the rank; minus one has no code, its neighbour is 0."""
    middle = splat(BYTES, 127)
    below = call(builder, "llvm.usub.sat.v64i8", BYTES, [middle, rank])
    return builder.select(negative(builder, sign), below, builder.add(middle, rank))


#: Compiled code calls these with contiguous rows of 256: values, factor, ``lane_tables``, codes.
#: Values that are not finite get any codes.
encode_signed_row: Any = intrinsic(_encoder(signed=True))
encode_positive_row: Any = intrinsic(_encoder(signed=False))
