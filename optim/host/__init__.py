"""Fused host kernels: serial, GIL-free loops over flat numpy views, one pass over memory.

Every kernel is compiled on first use and cached on disk.  All arithmetic is IEEE fp32, one
rounding an operation, no contraction and no reassociation: results depend neither on the CPU nor
on how a parameter is cut into ranges, and equal the torch-operation bricks bit for bit.

The kernel of bitsandbytes' 8-bit states has a second path, with the same bits, for processors that
permute bytes: ``vectors`` emits what a loop compiler does not find, ``dynamic_lanes`` decodes and
encodes 64 codes at a time.  The type of the kernel's ``tables`` argument picks the path.

The disk cache notices a change of a kernel's own file only: after editing a file that kernels
import, remove the ``*.nbi`` files in ``__pycache__``.  Installing a new version rewrites every
file and is safe.
"""
