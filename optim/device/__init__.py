"""Fused update kernels for accelerators, written in Triton, beside the host kernels.

The files mirror those of ``host``: a file a format, one for the masters, one for the bits.  Only
``launch`` may be imported without Triton.
"""
