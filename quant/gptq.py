"""GPTQ: codes chosen column by column so that a layer's *output* error is small.

Frantar et al., 2022.  Rounding one column makes an error that the columns still to come can
partly cancel, given the second moments H = E[x xᵀ] of the layer's inputs.  Works with any codec:
block scales are fixed first, from the original weight (so columns may be visited in any order
and the stored layout stays the codec's own), and a code is the nearest value of its block's grid
as the stored scale decodes it.  Afterwards scales and codes are refined in turn
(``gptq_refine``), which lowers the output error by another tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .blocks import BlockCodec
from .gptq_refine import (
    COLUMNS_AT_ONCE,
    block_multipliers,
    descend,
    free_block_width,
    searched_multipliers,
    solved_multipliers,
    with_multipliers,
)
from .tables import CodeTable, code_table, pack_nibbles


@final
class InputMoments:
    """The running second moments E[x xᵀ] of a layer's inputs.

    Memory: in_features² fp32.

    >>> moments = InputMoments(2)
    >>> moments.add(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> moments.matrix()
    tensor([[1., 1.],
            [1., 2.]])
    """

    def __init__(self, in_features: int, *, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Count inputs of shape (..., in_features)."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        self._sum.addmm_(rows.t(), rows)
        self._count += rows.shape[0]

    def matrix(self) -> Tensor:
        """Return the (in_features, in_features) fp32 mean."""
        if self._count == 0:
            raise ValueError("no inputs were counted; run calibration data through the layer")
        return self._sum / self._count


@final
@dataclass(frozen=True, slots=True)
class GptqResult:
    """Parts of the codec, and the relative output error before (nearest) and after (GPTQ)."""

    parts: dict[str, Tensor]
    nearest_error: float
    error: float


def gptq(
    weight: Tensor,
    moments: Tensor,
    codec: BlockCodec,
    *,
    damping: float = 0.01,
    by_importance: bool = True,
    refinements: int = 2,
    inputs_first: bool = False,
) -> GptqResult:
    """Encode ``weight`` (out, in) with codes that keep x Wᵀ close for inputs like those counted.

    ``moments`` is E[x xᵀ], (in, in), of ``InputMoments``; the factorisation runs in its dtype.
    ``damping`` times the mean diagonal is added to it.  ``by_importance`` visits the columns of
    large moments first.  ``refinements`` times the scales are solved for given the codes (where
    the codec leaves them free) and the codes descended given the scales, each about as much work
    as GPTQ itself; with 0 the scales are those of ``codec.encode``.  ``inputs_first``: the weight
    is (in, out), as GPT-2 keeps it, and so are the parts; its blocks run along the outputs, and
    their scales stay.  Memory: about six times the weight in fp32 and three times the moments.
    """
    inputs = weight.shape[0 if inputs_first else -1]
    if weight.ndim != 2 or moments.shape != (inputs, inputs):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} needs moments of shape "
            f"({inputs}, {inputs}), got {tuple(moments.shape)}"
        )
    if not bool(torch.isfinite(moments).all()):
        raise ValueError("the moments hold NaN or infinities; look at the calibration inputs")
    if refinements < 0:
        raise ValueError(f"refinements is {refinements}; give 0 or more")
    shape = (weight.shape[0], weight.shape[1])
    stored = weight.detach().to(torch.float32)
    exact = _turned(stored, inputs_first)
    parts = codec.encode(stored)
    nearest = _turned(codec.decode(parts, shape), inputs_first)
    nearest_error = output_error(exact, nearest, moments)
    table = code_table(codec.code_values(), weight.device)
    damped = _damped(moments, damping)
    width = free_block_width(codec, shape[1]) if refinements and not inputs_first else 0
    if width:
        found = searched_multipliers(
            exact, damped.diagonal().to(torch.float32), block_multipliers(codec, parts), table
        )
        parts = with_multipliers(codec, parts, found)
    grids = _grids(codec, parts, shape, inputs_first=inputs_first)
    codes = _one_pass(exact, damped, grids, table, damping=damping, by_importance=by_importance)
    damped = damped.to(torch.float32)
    for _ in range(refinements):
        if width:
            found = solved_multipliers(
                exact,
                table.lookup(codes),
                damped,
                block_multipliers(codec, parts),
                width=width,
            )
            parts = with_multipliers(codec, parts, found)
            grids = _grids(codec, parts, shape, inputs_first=inputs_first)
        codes = descend(exact, damped, codes, *grids, table)
    codes = _turned(codes, inputs_first)
    parts = parts | {"codes": _as_stored(codec, codes, parts["codes"])}
    decoded = _turned(codec.decode(parts, shape), inputs_first)
    return GptqResult(parts, nearest_error, output_error(exact, decoded, moments))


def _turned(matrix: Tensor, inputs_first: bool) -> Tensor:
    return matrix.t().contiguous() if inputs_first else matrix


def _one_pass(
    exact: Tensor,
    damped: Tensor,
    grids: tuple[Tensor, Tensor],
    table: CodeTable,
    *,
    damping: float,
    by_importance: bool,
) -> Tensor:
    """Return GPTQ's codes, (out, in) uint8."""
    columns = exact.shape[1]
    order = torch.arange(columns, device=exact.device)
    if by_importance:
        order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(damped[order][:, order], damping).to(torch.float32)
    work = exact[:, order].clone()
    offset, factor = (grid[:, order] for grid in grids)
    codes = torch.empty(exact.shape, dtype=torch.uint8, device=exact.device)
    for first in range(0, columns, COLUMNS_AT_ONCE):
        last = min(first + COLUMNS_AT_ONCE, columns)
        errors = torch.empty(exact.shape[0], last - first, device=exact.device)
        for column in range(first, last):
            value, scale = work[:, column], factor[:, column]
            live = scale != 0
            unit = torch.where(live, (value - offset[:, column]) / scale, torch.zeros_like(value))
            code = table.nearest(unit)
            rounded = offset[:, column] + scale * table.lookup(code)
            error = (value - rounded) / upper[column, column]
            work[:, column + 1 : last] -= torch.outer(error, upper[column, column + 1 : last])
            codes[:, column] = code
            errors[:, column - first] = error
        work[:, last:] -= errors @ upper[first:last, last:]
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return natural


def output_error(exact: Tensor, approximate: Tensor, moments: Tensor) -> float:
    """Return rms(x Eᵀ) / rms(x Wᵀ) for inputs of these second moments, E the difference."""
    moments = moments.to(torch.float32)
    error = (approximate - exact).to(torch.float32)
    exact = exact.to(torch.float32)
    numerator = ((error @ moments) * error).sum(dtype=torch.float64)
    denominator = ((exact @ moments) * exact).sum(dtype=torch.float64)
    return float((numerator.clamp(min=0.0) / denominator.clamp(min=1e-300)).sqrt())


def _grids(
    codec: BlockCodec, parts: dict[str, Tensor], shape: tuple[int, int], *, inputs_first: bool
) -> tuple[Tensor, Tensor]:
    """Return offset and factor, (out, in) fp32, with value = offset + factor * table[code]."""
    values = codec.code_values()
    zero = min(range(len(values)), key=lambda code: abs(values[code]))
    finite = [code for code, value in enumerate(values) if value == value and abs(value) < 1e30]
    top = max(finite, key=lambda code: values[code])
    decoded = []
    for code in (zero, top):
        constant = torch.full(shape, code, dtype=torch.uint8, device=parts["codes"].device)
        stored = _as_stored(codec, constant, parts["codes"])
        decoded.append(_turned(codec.decode(parts | {"codes": stored}, shape), inputs_first))
    offset, high = decoded
    return offset, (high - offset) / (values[top] - values[zero])


def _as_stored(codec: BlockCodec, codes: Tensor, like: Tensor) -> Tensor:
    """Pack codes of the weight's shape as the codec stores them, in the shape of ``like``."""
    if codec.code_bits == 8:
        return codes.view(like.dtype)
    if like.ndim == 1:  # flat blocks: pairs run on from row to row
        codes = codes.reshape(1, -1)
    packed = pack_nibbles(codes, high_first=codec.high_first, padding=codec.zero_code)
    return packed.reshape(like.shape)


def _damped(moments: Tensor, damping: float) -> Tensor:
    damped = moments.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    # Inputs that were never active: their column is free, any positive moment will do.
    diagonal += torch.where(diagonal == 0, mean.clamp(min=1e-30), torch.zeros_like(diagonal))
    diagonal += damping * mean
    return damped


def _inverse_factor(damped: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped moments."""
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise ValueError(
            f"the moments are not positive definite after damping {damping}; raise the damping "
            f"or give more calibration inputs"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
