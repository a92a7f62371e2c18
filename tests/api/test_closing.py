"""Closing behind an error."""

from __future__ import annotations

import pytest

from headrace.closing import ClosedAfter
from headrace.offload.budget import Budget, Tier
from headrace.offload.pool import SlabInUseError, SlabPool


def lent_view(pool: SlabPool) -> None:
    slab = pool.acquire("test", 8192)
    view = slab.view
    pool.release(slab)
    raise OSError(28, f"No space left on device ({len(view)} bytes)")


def test_the_error_stays_and_its_frames_let_go_of_slabs() -> None:
    pool = SlabPool(Budget(Tier.HOST, limit_bytes=1 << 20))
    with pytest.raises(OSError, match="No space left") as caught, ClosedAfter(pool.close):
        lent_view(pool)
    assert not getattr(caught.value, "__notes__", [])
    assert pool.statistics().unmapped_count == 1


def test_frames_of_the_error_it_came_from_let_go_too() -> None:
    pool = SlabPool(Budget(Tier.HOST, limit_bytes=1 << 20))
    with pytest.raises(RuntimeError, match="worse"), ClosedAfter(pool.close):
        try:
            lent_view(pool)
        except OSError as error:
            raise RuntimeError("worse") from error
    assert pool.statistics().unmapped_count == 1


def test_an_error_of_closing_is_a_note_behind_another_and_raised_alone() -> None:
    pool = SlabPool(Budget(Tier.HOST, limit_bytes=1 << 20))
    kept = pool.acquire("test", 8192)
    with pytest.raises(KeyError) as caught, ClosedAfter(pool.close):
        raise KeyError("first")
    assert "SlabInUseError" in caught.value.__notes__[0]
    with pytest.raises(SlabInUseError), ClosedAfter(pool.close):
        pass
    assert kept.nbytes == 8192
