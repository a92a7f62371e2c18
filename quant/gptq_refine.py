"""Making GPTQ's result better: block scales and codes in turn, each the best for the other.

GPTQ decides a column once, before those that follow.  Here every column is looked at again with
all others in place (cyclic coordinate descent, as CDQuant and QuantEase do it, 2023-24), and the
scales of a row's blocks are solved for together by least squares in the norm of the outputs.
Scales are chosen freely: whoever decodes the layout multiplies by what is stored.  ``fitted_parts``
does so much of it as needs no data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .blocks import BlockCodec, FlatCodec
from .four_bit import FourBitTableCodec, decode_magnitudes, encode_magnitudes
from .int4_group import Int4GroupCodec
from .scales import SCALE_DTYPES, SMALLEST_SUBNORMAL
from .tables import CodeTable, code_table, pack_nibbles

COLUMNS_AT_ONCE = 128  # columns whose corrections are applied to the rest together
_SMALLEST_SHARE, _LARGEST_SHARE, _SHARES = 0.6, 1.15, 23
_SYSTEM_NUMBERS = 1 << 24  # of the linear systems that are solved at once, three times held
_PULL = 1e-4  # towards the scales there are, where the inputs do not tell


def free_block_width(codec: BlockCodec, columns: int) -> int:
    """Return the width of blocks whose one multiplier may be chosen; 0 if there is none.

    Those are the magnitudes of NF4 and FP4 and the scales of signed INT4 (the other formats'
    scales are powers of two or 8-bit floats, or come with a minimum), in whole blocks of a row.
    """
    if isinstance(codec, FourBitTableCodec):
        width = codec.block_size
    elif isinstance(codec, Int4GroupCodec) and codec.mode == "signed":
        width = codec.block_size or columns
    else:
        return 0
    return width if columns % width == 0 else 0


def block_multipliers(codec: BlockCodec, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the multipliers of all blocks, (blocks,) fp32, as they decode."""
    if isinstance(codec, Int4GroupCodec):
        return parts["scale"].reshape(-1).to(torch.float32)
    if isinstance(codec, FourBitTableCodec) and codec.double_quantized:
        return decode_magnitudes(parts, 0, parts["absmax"].numel())
    return parts["absmax"]


def with_multipliers(
    codec: BlockCodec, parts: Mapping[str, Tensor], values: Tensor
) -> dict[str, Tensor]:
    """Return the parts with other multipliers (blocks,), rounded to how the codec keeps them."""
    if isinstance(codec, Int4GroupCodec):
        dtype = SCALE_DTYPES[codec.scale_dtype]
        smallest = SMALLEST_SUBNORMAL[codec.scale_dtype]
        stored = values.clamp(smallest, torch.finfo(dtype).max).to(dtype)
        # A block of zeros keeps the scale zero.
        stored = torch.where(values == 0, torch.zeros_like(stored), stored)
        return dict(parts) | {"scale": stored.view(parts["scale"].shape)}
    if isinstance(codec, FourBitTableCodec) and codec.double_quantized:
        return dict(parts) | encode_magnitudes(values)
    return dict(parts) | {"absmax": values}


def searched_multipliers(
    weight: Tensor, importance: Tensor, multipliers: Tensor, table: CodeTable
) -> Tensor:
    """Return, for each block, the share of its multiplier that rounds it with the least error.

    ``weight`` (out, in), ``importance`` (in,) the weight of a column's squared error.  Shares
    from 0.6 to 1.15; the present multiplier is among them.  Memory: five fp32 copies of the weight.
    """
    count = multipliers.numel()
    blocks = weight.reshape(count, -1)
    weights = importance.expand(weight.shape).reshape(count, -1)
    best = multipliers.clone()
    least = _block_error(blocks, weights, best, table)
    for share in torch.linspace(_SMALLEST_SHARE, _LARGEST_SHARE, _SHARES).tolist():
        tried = multipliers * share
        error = _block_error(blocks, weights, tried, table)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, tried, best)
    return best


def fitted_parts(weight: Tensor, codec: BlockCodec) -> dict[str, Tensor]:
    """Encode with the multiplier of each block that gives the least squared error; no data.

    A magnitude below the block's largest one cuts that off and rounds the others on a finer grid:
    NF4 of normally distributed weights has 14 % less squared error so, in the same bytes and for
    the same decoder.  A short last block, and codecs that leave nothing free, are encoded as
    ``codec.encode`` does.  Memory: as ``searched_multipliers``.

    >>> from .nf4 import Nf4Codec
    >>> weight, codec = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), Nf4Codec()
    >>> fitted, nearest = fitted_parts(weight, codec), codec.encode(weight)
    >>> errors = [(codec.decode(p, (64, 64)) - weight).square().sum() for p in (fitted, nearest)]
    >>> bool(errors[0] < 0.9 * errors[1])
    True
    """
    parts = codec.encode(weight)
    columns = weight.shape[-1] if weight.ndim else 1
    width = free_block_width(codec, weight.numel() if isinstance(codec, FlatCodec) else columns)
    if not width or not weight.numel():
        return parts
    table = code_table(codec.code_values(), weight.device)
    flat = weight.detach().to(torch.float32).reshape(-1, width)
    searched = searched_multipliers(
        flat, flat.new_ones(width), block_multipliers(codec, parts), table
    )
    parts = with_multipliers(codec, parts, searched)
    scale = block_multipliers(codec, parts)[:, None]
    unit = torch.where(scale != 0, flat / scale, torch.zeros_like(flat))
    codes = table.nearest(unit)
    if isinstance(codec, FlatCodec):
        codes = codes.reshape(1, -1)
    else:
        codes = codes.reshape(weight.shape)
    packed = pack_nibbles(codes, high_first=codec.high_first, padding=codec.zero_code)
    return parts | {"codes": packed.reshape(parts["codes"].shape)}


def _block_error(blocks: Tensor, weights: Tensor, scale: Tensor, table: CodeTable) -> Tensor:
    column = scale[:, None]
    unit = torch.where(column != 0, blocks / column, torch.zeros_like(blocks))
    error = column * table.lookup(table.nearest(unit)) - blocks
    return (error.square_() * weights).sum(dim=1)


def solved_multipliers(
    weight: Tensor, unit: Tensor, moments: Tensor, multipliers: Tensor, *, width: int
) -> Tensor:
    """Return the multipliers (blocks,) that bring ``unit`` closest to ``weight`` in the outputs.

    ``unit`` (out, in): what the codes stand for before scaling.  One linear system a row, of as
    many unknowns as the row has blocks.  Where the solution is not positive, or all of a block's
    codes are zero, the present multiplier stays.  Memory: as many rows at once as 256 MB of
    systems allow, beside four fp32 copies of those rows.
    """
    blocks = weight.shape[1] // width
    at_once = max(1, _SYSTEM_NUMBERS // blocks**2)
    solved = [
        _solved_rows(weight[rows], unit[rows], moments, old, width=width)
        for first in range(0, weight.shape[0], at_once)
        for rows in (slice(first, first + at_once),)
        for old in (multipliers.view(-1, blocks)[rows],)
    ]
    return torch.cat(solved).reshape(-1)


def _solved_rows(
    weight: Tensor, unit: Tensor, moments: Tensor, old: Tensor, *, width: int
) -> Tensor:
    rows, blocks = old.shape
    system = weight.new_empty(rows, blocks, blocks)
    for block in range(blocks):
        part = slice(block * width, (block + 1) * width)
        reached = unit[:, part] @ moments[part]
        system[:, block] = (reached * unit).view(rows, blocks, width).sum(dim=2)
    wanted = ((weight @ moments) * unit).view(rows, blocks, width).sum(dim=2)
    diagonal = system.diagonal(dim1=1, dim2=2)
    silent = diagonal <= 0
    pull = torch.where(silent, torch.ones_like(diagonal), _PULL * diagonal)
    system += torch.diag_embed(pull)
    solved = torch.linalg.solve(system, (wanted + pull * old)[..., None])[..., 0]
    usable = torch.isfinite(solved) & (solved > 0) & ~silent
    return torch.where(usable, solved, old)


def descend(
    weight: Tensor,
    moments: Tensor,
    codes: Tensor,
    offset: Tensor,
    factor: Tensor,
    table: CodeTable,
) -> Tensor:
    """Return the codes after every column has once been chosen anew, the others being as they are.

    All (out, in); value = offset + factor * table[code].  The output error of (positive) second
    moments never rises.
    """
    codes = codes.clone()
    value = offset + factor * table.lookup(codes)
    slope = (weight - value) @ moments
    power = moments.diagonal().tolist()
    columns = weight.shape[1]
    for first in range(0, columns, COLUMNS_AT_ONCE):
        last = min(first + COLUMNS_AT_ONCE, columns)
        near = slope[:, first:last].clone()
        inner = moments[first:last, first:last]
        moved = torch.zeros_like(near)
        for column in range(first, last):
            if power[column] <= 0:
                continue
            place = column - first
            scale = factor[:, column]
            target = value[:, column] + near[:, place] / power[column] - offset[:, column]
            unit = torch.where(scale != 0, target / scale, torch.zeros_like(target))
            code = table.nearest(unit)
            chosen = offset[:, column] + scale * table.lookup(code)
            moved[:, place] = chosen - value[:, column]
            codes[:, column], value[:, column] = code, chosen
            near[:, place + 1 :] -= torch.outer(moved[:, place], inner[place, place + 1 :])
        slope -= moved @ moments[first:last]
    return codes
