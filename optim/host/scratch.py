"""Scratch of compiled kernels on the machine stack.

The compiler knows that no argument points into it, so that loops which read arguments and write
scratch become SIMD code without run-time overlap checks.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

#: Elements of one piece of scratch: eight blocks of 128, four of 256.  4 KiB.
TILE = 1024


def _floats(typing_context: Any) -> Any:
    """Return a pointer to uninitialised fp32 scratch of the calling function."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        room = cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), TILE))
        room.align = 64
        return builder.bitcast(room, ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(), generate


#: Compiled code makes arrays of it: ``carray(tile_pointer(), (BLOCKS, BLOCK))``.
tile_pointer: Any = intrinsic(_floats)
