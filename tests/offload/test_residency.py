"""The table of residencies: what is reachable, what is refused, what each place costs."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.offload.errors import HeadraceError, ResidencyError
from headrace.offload.residency import (
    LEGAL_MOVES,
    Residency,
    check_move,
    device_slots,
    host_slabs,
)

STATES = list(Residency)


def reachable(start: Residency) -> set[Residency]:
    """States that legal moves lead to from ``start``, itself included."""
    seen, todo = {start}, [start]
    while todo:
        now = todo.pop()
        for a, b in LEGAL_MOVES:
            if a is now and b not in seen:
                seen.add(b)
                todo.append(b)
    return seen


@pytest.mark.parametrize("state", STATES, ids=lambda s: s.name)
def test_every_state_is_reached_and_left(state: Residency) -> None:
    assert state in reachable(Residency.DISK)
    assert reachable(state) == set(STATES)


@pytest.mark.parametrize("state", STATES, ids=lambda s: s.name)
def test_no_state_moves_to_itself(state: Residency) -> None:
    assert (state, state) not in LEGAL_MOVES


@given(st.lists(st.sampled_from(STATES), max_size=40))
def test_only_moves_of_the_table_are_made(wanted: list[Residency]) -> None:
    """A walk that asks for anything at all passes through legal moves only."""
    now = Residency.DISK
    for state in wanted:
        if (now, state) in LEGAL_MOVES:
            now = check_move("layers.3", now, state)
            assert now is state
        else:
            with pytest.raises(ResidencyError):
                check_move("layers.3", now, state)


def test_refusal_names_chunk_states_and_choices() -> None:
    illegal = [m for m in product(STATES, STATES) if m not in LEGAL_MOVES]
    for now, wanted in illegal:
        with pytest.raises(ResidencyError) as caught:
            check_move("model.layers.7", now, wanted)
        message = str(caught.value)
        assert "'model.layers.7'" in message
        assert f"from {now.name} to {wanted.name}" in message
        choices = message.rpartition(": ")[2].split(", ")
        assert choices == sorted(b.name for a, b in LEGAL_MOVES if a is now)
        assert isinstance(caught.value, HeadraceError)


def test_costs() -> None:
    costs = {s.name: (host_slabs(s), device_slots(s)) for s in STATES}
    assert costs == {
        "DISK": (0, 0),
        "READING": (1, 0),
        "HOST": (1, 0),
        "UPLOADING": (1, 1),
        "DEVICE": (0, 1),
        "BOTH": (1, 1),
        "UPDATING": (1, 0),
    }


def test_valid_bytes_never_vanish() -> None:
    """A move that gives up memory ends where the bytes still are, or on disk."""
    for now, wanted in LEGAL_MOVES:
        if host_slabs(wanted) < host_slabs(now) and device_slots(wanted) < device_slots(now):
            assert wanted is Residency.DISK
        # Copies start from a place that holds the bytes, or is about to.
        if wanted is Residency.UPLOADING:
            assert host_slabs(now) == 1
        if wanted is Residency.BOTH:
            assert device_slots(now) == 1
        if wanted is Residency.READING:
            assert now is Residency.DISK


def test_an_update_voids_the_device_copy() -> None:
    assert all(
        b in (Residency.HOST, Residency.DISK) for a, b in LEGAL_MOVES if a.name == "UPDATING"
    )
    assert (Residency.UPLOADING, Residency.UPDATING) not in LEGAL_MOVES
