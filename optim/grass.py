"""GRASS: an inner optimizer on a few rows (or columns), chosen by gradient norm."""

from __future__ import annotations

from typing import Literal

from .base import Brick
from .galore import GaLore
from .projector import Projector
from .slices import MultinomialProjector, SliceProjector

Selection = Literal["top", "multinomial", "uniform"]


def grass(
    inner: Brick,
    *,
    rank: int = 128,
    gap: int = 200,
    scale: float = 0.25,
    selection: Selection = "top",
) -> GaLore:
    """Return GRASS (Muhamed et al., arXiv:2406.17660) over ``rank`` slices of the shorter side.

    ``selection``: ``"top"`` takes those of largest norm (the paper's best), ``"multinomial"``
    draws them in proportion to their norms and scales them so that the projection is unbiased,
    ``"uniform"`` draws them all alike.  Moments restart at every refresh, as in the paper.
    State: max(m, n) r a moment, and r int32 (multinomial: and r fp32; uniform: none).
    """
    projectors: dict[str, Projector] = {
        "top": SliceProjector(rank=rank, choice="norm"),
        "multinomial": MultinomialProjector(rank),
        "uniform": SliceProjector(rank=rank, choice="random"),
    }
    if selection not in projectors:
        raise ValueError(f"selection={selection!r} is unknown; choose one of {list(projectors)}")
    return GaLore(inner, projectors[selection], gap=gap, carry="reset", scale=scale)
