"""GRASS: an inner optimizer on the rows (or columns) of largest gradient norm."""

from __future__ import annotations

from .base import Brick
from .galore import GaLore
from .projector import SliceProjector


def grass(inner: Brick, *, rank: int = 128, gap: int = 200, scale: float = 0.25) -> GaLore:
    """Return GRASS (Muhamed et al., arXiv:2406.17660) in its Top-r variant.

    The projection picks ``rank`` slices of the shorter side by norm and moments restart at every
    refresh, as in the paper.  State: max(m, n) r a moment and r int32.
    """
    projector = SliceProjector(rank=rank, choice="norm")
    return GaLore(inner, projector, gap=gap, carry="reset", scale=scale)
