"""Schedule and Cursor against brute force: next uses, Belady's victim, learning of new orders."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.offload.budget import Tier
from headrace.offload.schedule import Cursor, Phase, Schedule, Visit

NAMES = "abcdef"
VISITS = st.builds(
    Visit,
    st.sampled_from(NAMES),
    st.sampled_from(list(Phase)),
    st.sampled_from([Tier.DEVICE, Tier.HOST]),
)
LAPS = st.lists(VISITS, min_size=1, max_size=14)
POSITIONS = st.integers(0, 40)
TIERS = st.sampled_from([None, Tier.DEVICE, Tier.HOST])


def walked_distance(lap: list[Visit], chunk: str, position: int, tier: Tier | None) -> int | None:
    """Walk the cycle visit by visit."""
    for ahead in range(len(lap)):
        visit = lap[(position + ahead) % len(lap)]
        if visit.chunk == chunk and tier in (None, visit.tier):
            return ahead
    return None


@pytest.mark.parametrize("module", ["schedule", "residency", "budget", "errors", "timeline"])
def test_logic_imports_no_torch(module: str) -> None:
    code = (
        f"import sys, headrace.offload.{module}\n"
        f"assert 'torch' not in sys.modules, 'torch came with {module}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@given(LAPS, st.sampled_from([*NAMES, "never"]), POSITIONS, TIERS)
def test_distance_is_what_walking_finds(
    lap: list[Visit], chunk: str, position: int, tier: Tier | None
) -> None:
    assert Schedule(lap).distance(chunk, position, tier=tier) == walked_distance(
        lap, chunk, position, tier
    )


@given(LAPS, POSITIONS, st.none() | st.integers(0, 40))
def test_upcoming_goes_around_once_at_most(
    lap: list[Visit], position: int, count: int | None
) -> None:
    ahead = list(Schedule(lap).upcoming(position, count))
    assert len(ahead) == min(len(lap), len(lap) if count is None else count)
    for expected, (distance, visit) in enumerate(ahead):
        assert distance == expected
        assert visit == lap[(position + distance) % len(lap)]


@given(
    LAPS,
    st.sets(st.sampled_from([*NAMES, "never"])),
    POSITIONS,
    st.integers(-1, 14),
    TIERS,
)
def test_victim_is_the_farthest(
    lap: list[Visit], candidates: set[str], position: int, farther_than: int, tier: Tier | None
) -> None:
    far = {}
    for chunk in candidates:
        distance = walked_distance(lap, chunk, position, tier)
        far[chunk] = float("inf") if distance is None else distance
    victim = Schedule(lap).victim(
        sorted(candidates), position=position, farther_than=farther_than, tier=tier
    )
    allowed = {c: d for c, d in far.items() if d > farther_than}
    if not allowed:
        assert victim is None
    else:
        assert victim is not None
        assert allowed[victim] == max(allowed.values())


def fewest_misses(references: str, capacity: int) -> int:
    """Fewest fetches of unit-sized chunks from an empty cache, by trying every choice."""
    states: dict[frozenset[str], int] = {frozenset(): 0}
    for chunk in references:
        following: dict[frozenset[str], int] = {}
        for held, misses in states.items():
            if chunk in held:
                options = [(held, misses)]
            elif len(held) < capacity:
                options = [(held | {chunk}, misses + 1)]
            else:
                options = [(held - {out} | {chunk}, misses + 1) for out in held]
            for after, count in options:
                following[after] = min(count, following.get(after, count))
        states = following
    return min(states.values())


@given(st.text("abcde", min_size=1, max_size=12), st.integers(1, 4))
def test_victim_is_optimal(references: str, capacity: int) -> None:
    """Belady's choice misses as rarely as the best of all eviction sequences."""
    # What is never needed again is farthest: pad the lap so that it does not wrap around.
    lap = Schedule(
        [*(Visit(c, Phase.FORWARD) for c in references), *(Visit("end", Phase.UPDATE),) * 20]
    )
    held: set[str] = set()
    misses = 0
    for position, chunk in enumerate(references):
        if chunk in held:
            continue
        misses += 1
        if len(held) == capacity:
            victim = lap.victim(sorted(held), position=position + 1)
            assert victim is not None
            held.remove(victim)
        held.add(chunk)
    assert misses == fewest_misses(references, capacity)


@given(st.text("abcde", min_size=1, max_size=8), st.integers(1, 6))
def test_misses_of_a_steady_state(references: str, capacity: int) -> None:
    """Never fewer than the best over many laps; everything fits: nothing is fetched."""
    schedule = Schedule(Visit(c, Phase.FORWARD) for c in references)
    distinct = len(set(references))
    fetched = schedule.misses(capacity, lambda chunk: 1)
    if distinct <= capacity:
        assert fetched == 0
    else:
        assert 1 <= fetched <= len(references)
        assert fetched >= distinct - capacity
    assert schedule.misses(0, lambda chunk: 1) == len(references)


def test_training_backward_order() -> None:
    visits = Schedule.training(
        ["emb", "l0", "l1"], updated=["emb", "l1"], update="backward", host=["emb"]
    ).visits
    f, b, u = Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE
    assert visits == (
        Visit("emb", f, Tier.HOST),
        Visit("l0", f),
        Visit("l1", f),
        Visit("l1", b),
        Visit("l1", u, Tier.HOST),
        Visit("l0", b),
        Visit("emb", u, Tier.HOST),
    )


def test_training_forward_order() -> None:
    visits = Schedule.training(["l0", "l1"], updated=["l0", "l1"], update="forward").visits
    f, b, u = Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE
    assert visits == (
        Visit("l0", u, Tier.HOST),
        Visit("l0", f),
        Visit("l1", u, Tier.HOST),
        Visit("l1", f),
        Visit("l1", b),
        Visit("l0", b),
    )


def test_schedule_refusals() -> None:
    with pytest.raises(ValueError, match="at least one visit"):
        Schedule([])
    with pytest.raises(ValueError, match="'sideways'"):
        Schedule.training(["a"], update="sideways")


@given(LAPS)
def test_cursor_follows_the_expected_lap(lap: list[Visit]) -> None:
    schedule = Schedule(lap)
    cursor = Cursor(schedule)
    for number, visit in enumerate(lap):
        assert cursor.position == number % len(lap)
        cursor.advance(visit)
    assert cursor.position == 0
    assert cursor.finish() is schedule


def first_difference(lap: list[Visit]) -> list[Visit]:
    """The lap with each visit once: then a visit's place in it is unambiguous."""
    return list(dict.fromkeys(lap))


@given(LAPS, st.data())
def test_cursor_skips_what_does_not_come(lap: list[Visit], data: st.DataObject) -> None:
    lap = first_difference(lap)
    kept = sorted(data.draw(st.sets(st.integers(0, len(lap) - 1), min_size=1)))
    cursor = Cursor(Schedule(lap))
    for number in kept:
        cursor.advance(lap[number])
        assert cursor.position == (number + 1) % len(lap)
    assert cursor.finish().visits == tuple(lap[number] for number in kept)


@given(LAPS, st.data())
def test_cursor_stays_at_unknown_visits(lap: list[Visit], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(lap) - 1))
    cursor = Cursor(Schedule(lap))
    for visit in lap[:position]:
        cursor.advance(visit)
    before = cursor.position
    stranger = Visit("stranger", Phase.FORWARD)
    cursor.advance(stranger)
    assert cursor.position == before
    for visit in lap[position:]:
        cursor.advance(visit)
    learnt = cursor.finish()
    assert learnt.visits == (*lap[:position], stranger, *lap[position:])
    assert "stranger" in learnt


@given(LAPS, LAPS)
def test_cursor_learns_a_new_order(expected: list[Visit], seen: list[Visit]) -> None:
    cursor = Cursor(Schedule(expected))
    for visit in seen:
        cursor.advance(visit)
    learnt = cursor.finish()
    assert learnt.visits == tuple(seen)
    # The next lap, in the same order, is then expected from its first visit on.
    again = Cursor(learnt)
    for number, visit in enumerate(seen):
        assert again.position == number % len(seen)
        again.advance(visit)
    assert again.finish() is learnt


def test_cursor_without_visits_keeps_its_schedule() -> None:
    schedule = Schedule([Visit("a", Phase.FORWARD)])
    cursor = Cursor(schedule)
    assert cursor.finish() is schedule
    cursor.advance(Visit("b", Phase.FORWARD))
    cursor.finish()
    # Visits of the lap before are forgotten.
    assert cursor.finish() is schedule
