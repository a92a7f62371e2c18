"""Slabs: exact, aligned, on the ledger from before they are mapped until after they are gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.offload.budget import Budget, Tier
from headrace.offload.errors import BudgetError
from headrace.offload.pool import HUGE_PAGE_BYTES, Slab, SlabInUseError, SlabPool, round_up

MIB = 1 << 20


def host(limit_bytes: int) -> Budget:
    return Budget(Tier.HOST, limit_bytes=limit_bytes)


@pytest.fixture
def pool() -> Iterator[SlabPool]:
    made = SlabPool(host(64 * MIB))
    yield made
    made.close()


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 2 * MIB, 5 * MIB + 1])
def test_a_slab_is_rounded_to_pages_aligned_and_writable(pool: SlabPool, nbytes: int) -> None:
    slab = pool.acquire("chunk", nbytes)
    assert slab.nbytes == len(slab.view) == round_up(nbytes)
    assert slab.address % (HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else 4096) == 0
    slab.view[-1] = 7
    assert slab.view[slab.nbytes - 1] == 7
    pool.release(slab)


def test_the_ledger_holds_idle_slabs_until_they_are_unmapped() -> None:
    budget = host(MIB)
    pool = SlabPool(budget)
    slab = pool.acquire("chunk", 10_000)
    pool.release(slab)
    assert budget.statistics().in_use_bytes == 12_288
    assert pool.statistics().idle_bytes == 12_288
    assert pool.trim() == 12_288
    assert budget.statistics().in_use_bytes == 0
    pool.close()


def test_same_and_slightly_smaller_requests_reuse_a_slab(pool: SlabPool) -> None:
    first = pool.acquire("a", 10 * 4096)
    address = first.address
    pool.release(first)
    again = pool.acquire("b", 8 * 4096)
    assert again.address == address
    assert again.nbytes == 8 * 4096
    pool.release(again)
    much_smaller = pool.acquire("c", 7 * 4096)
    assert much_smaller.address != address
    pool.release(much_smaller)
    assert pool.statistics().reused_count == 1


def test_idle_slabs_of_other_sizes_make_room_largest_first() -> None:
    budget = host(10 * 4096)
    pool = SlabPool(budget)
    large, small = pool.acquire("large", 6 * 4096), pool.acquire("small", 2 * 4096)
    small_address = small.address
    pool.release(large)
    pool.release(small)
    wanted = pool.acquire("wanted", 8 * 4096)
    assert pool.statistics().unmapped_count == 1
    kept = pool.acquire("kept", 2 * 4096)
    assert kept.address == small_address
    pool.release(wanted)
    pool.release(kept)
    pool.close()


def test_a_full_budget_names_the_borrower_the_holders_and_what_would_do() -> None:
    pool = SlabPool(host(8192))
    slab = pool.acquire("layers.0", 8192)
    assert pool.try_acquire("layers.1", 4096) is None
    with pytest.raises(BudgetError, match=r"'layers\.1'.*4,096.*'layers\.0' 8,192.*12,288"):
        pool.acquire("layers.1", 4096)
    pool.release(slab)
    pool.close()


def test_unmapping_under_a_live_view_is_refused_and_loses_nothing() -> None:
    budget = host(MIB)
    pool = SlabPool(budget)
    slab = pool.acquire("chunk", 4096)
    array = np.frombuffer(slab.view, dtype=np.uint8)
    pool.release(slab)
    with pytest.raises(SlabInUseError, match="alive"):
        pool.close()
    assert array[0] == 0  # still mapped
    assert budget.statistics().in_use_bytes == 4096
    del array
    pool.close()
    assert budget.statistics().in_use_bytes == 0


def test_unmapping_under_a_tensor_is_refused() -> None:
    torch = pytest.importorskip("torch")
    pool = SlabPool(host(MIB))
    slab = pool.acquire("chunk", 4096)
    part = torch.frombuffer(slab.view, dtype=torch.float32)[5:]
    pool.release(slab)
    with pytest.raises(SlabInUseError):
        pool.trim()
    assert part[0] == 0.0
    del part
    pool.close()


def test_closing_with_a_slab_held_names_its_borrower(pool: SlabPool) -> None:
    slab = pool.acquire("forgotten", 4096)
    with pytest.raises(SlabInUseError, match="forgotten"):
        pool.close()
    pool.release(slab)


def test_a_released_slab_is_dead(pool: SlabPool) -> None:
    slab = pool.acquire("chunk", 4096)
    pool.release(slab)
    for use in (lambda: slab.view, lambda: slab.address, lambda: pool.release(slab)):
        with pytest.raises(ValueError, match="released"):
            use()


def test_a_slab_of_another_pool_is_refused(pool: SlabPool) -> None:
    other = SlabPool(host(MIB))
    slab = other.acquire("chunk", 4096)
    with pytest.raises(ValueError, match="another pool"):
        pool.release(slab)
    other.release(slab)
    other.close()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_nothing_is_no_request(pool: SlabPool, nbytes: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        pool.acquire("chunk", nbytes)


def test_slabs_are_pinned_after_mapping_and_unpinned_before_unmapping() -> None:
    events: list[tuple[str, int, int]] = []
    pool = SlabPool(
        host(16 * MIB),
        pin=lambda address, nbytes: events.append(("pin", address, nbytes)),
        unpin=lambda address, nbytes: events.append(("unpin", address, nbytes)),
    )
    slab = pool.acquire("chunk", 3 * MIB)
    address = slab.address
    pool.release(slab)
    pool.close()
    assert events == [("pin", address, 3 * MIB), ("unpin", address, 3 * MIB)]


def test_a_failed_pin_leaves_no_trace() -> None:
    def refuse(address: int, nbytes: int) -> None:
        raise RuntimeError(f"cannot register {nbytes} bytes")

    budget = host(MIB)
    pool = SlabPool(budget, pin=refuse)
    with pytest.raises(RuntimeError, match="cannot register"):
        pool.acquire("chunk", 4096)
    assert budget.statistics().in_use_bytes == 0
    pool.close()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_resident_memory_never_exceeds_the_ledger_by_huge_page_rounding() -> None:
    budget = host(512 * MIB)
    pool = SlabPool(budget)
    before = _resident_bytes()
    # Odd sizes: a huge page under each tail would cost up to 2 MiB a slab, 40 MiB in all.
    slabs = [pool.acquire(f"chunk {i}", 2 * MIB + 8192) for i in range(20)]
    grown = _resident_bytes() - before
    assert grown <= budget.statistics().in_use_bytes + 4 * MIB
    for slab in slabs:
        pool.release(slab)
    pool.close()
    assert _resident_bytes() - before <= 4 * MIB


def test_a_forked_child_keeps_no_copy_of_slabs(pool: SlabPool) -> None:
    slab = pool.acquire("chunk", 4 * MIB)
    slab.view[:4] = b"live"
    child = os.fork()
    if child == 0:
        os._exit(0 if slab.view[:4] == bytes(4) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert slab.view[:4] == b"live"
    pool.release(slab)


def test_threads_share_a_pool() -> None:
    budget = host(64 * 4096)
    pool = SlabPool(budget)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(100):
                slab = pool.try_acquire(f"thread {seed}", 4096 * (1 + (seed + turn) % 7))
                if slab is not None:
                    slab.view[0] = seed
                    assert slab.view[0] == seed
                    pool.release(slab)
        except BaseException as error:  # noqa: BLE001  (told to the main thread)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    pool.close()
    assert budget.statistics().in_use_bytes == 0


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("acquire"), st.integers(1, 40_000)),
            st.tuples(st.just("release"), st.integers(0, 10)),
        ),
        max_size=40,
    )
)
def test_ledger_and_pool_agree_whatever_happens(moves: list[tuple[str, int]]) -> None:
    budget = host(100_000)
    pool = SlabPool(budget)
    held: list[Slab] = []
    for move, number in moves:
        if move == "acquire":
            slab = pool.try_acquire(f"borrower {number}", number)
            if slab is not None:
                held.append(slab)
            else:
                in_use = pool.statistics().held_bytes
                assert in_use + round_up(number) > budget.limit_bytes
        elif held:
            pool.release(held.pop(number % len(held)))
        statistics = pool.statistics()
        in_use = budget.statistics().in_use_bytes
        assert statistics.held_bytes + statistics.idle_bytes == in_use <= budget.limit_bytes
        spans = sorted((slab.address, slab.nbytes) for slab in held)
        for (start, nbytes), (following, _) in pairwise(spans):
            assert start + nbytes <= following
    for slab in held:
        pool.release(slab)
    pool.close()
    assert budget.statistics().in_use_bytes == 0
