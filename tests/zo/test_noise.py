"""Noise: known answers, addressability, host kernel equal to the specification, statistics."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.zo import philox
from headrace.zo.noise import (
    Factor,
    Kind,
    assign_streams,
    noise,
    noise_of_directions,
    reference_noise,
    step_seed,
)

KINDS = list(Kind)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox.philox_words(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_irwin_hall_spells_out_the_known_answer_bytes() -> None:
    """Kernel values against the published words, so that lanes and byte order are pinned."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    sums = torch.tensor([sum(word.to_bytes(4, "little")) - 510 for word in words])
    expected = sums.to(torch.float32) * philox.BYTE_SUM_SCALE
    made = noise(Kind.IRWIN_HALL, seed=0, stream=0, direction=0, start=0, count=4)
    assert torch.equal(made, expected)
    assert pytest.approx(1 / 147.8, rel=1e-4) == philox.BYTE_SUM_SCALE


def test_rademacher_signs_are_the_known_answer_bits() -> None:
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    bits = [(word >> bit) & 1 for word in words for bit in range(32)]
    made = noise(Kind.RADEMACHER, seed=0, stream=0, direction=0, start=0, count=128)
    assert made.tolist() == [1.0 - 2.0 * bit for bit in bits]


def test_gaussian_is_box_muller_of_the_words() -> None:
    words = philox.block_words(0, 4096, seed=99, stream=7, direction=5).to(torch.float64)
    u = (words + 0.5) * 2.0**-32
    radius = torch.sqrt(-2 * torch.log(u[:, 0::2]))
    angle = 2 * torch.pi * u[:, 1::2]
    exact = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), 2).reshape(-1)
    made = noise(Kind.GAUSSIAN, seed=99, stream=7, direction=5, start=0, count=4 * 4096)
    assert (made.double() - exact).abs().max() < 2e-6


GOLDEN = {
    Kind.GAUSSIAN: "3c451eba68ab5698",
    Kind.RADEMACHER: "bec86471cc138784",
    Kind.IRWIN_HALL: "79d7d25e66fa5353",
}


@pytest.mark.parametrize("kind", KINDS)
def test_bits_never_change(kind: Kind) -> None:
    """A log written today must replay in years: the bits are part of the format."""
    made = noise(kind, seed=2**63 + 11, stream=0xDEADBEEF, direction=3, start=2**35 + 1, count=5000)
    digest = hashlib.sha256(made.numpy().tobytes()).hexdigest()
    assert digest.startswith(GOLDEN[kind])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    direction=st.integers(0, 2**32 - 1),
    start=st.integers(0, 2**40),
    count=st.integers(0, 1500),
)
def test_host_kernel_equals_specification(
    kind: Kind, seed: int, stream: int, direction: int, start: int, count: int
) -> None:
    where = {"seed": seed, "stream": stream, "direction": direction, "start": start, "count": count}
    assert torch.equal(noise(kind, **where), reference_noise(kind, **where))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 3000), max_size=6), start=st.integers(0, 2**36))
def test_any_chunking_gives_the_same_bits(kind: Kind, cuts: list[int], start: int) -> None:
    where = {"seed": 5, "stream": 6, "direction": 7}
    whole = noise(kind, start=start, count=3000, **where)
    edges = [0, *sorted(cuts), 3000]
    parts = [
        noise(kind, start=start + low, count=high - low, **where)
        for low, high in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("kind", "kurtosis"), [(Kind.GAUSSIAN, 3.0), (Kind.RADEMACHER, 1.0), (Kind.IRWIN_HALL, 2.7)]
)
def test_moments_and_correlations(kind: Kind, kurtosis: float) -> None:
    count = 1 << 20
    where = {"start": 0, "count": count}
    z = noise(kind, seed=1, stream=2, direction=0, **where).double()
    bound = 5 / count**0.5
    assert abs(z.mean()) < bound
    assert abs(z.square().mean() - 1) < 2 * bound
    assert abs(z.pow(3).mean()) < 4 * bound
    assert abs(z.pow(4).mean() - kurtosis) < 12 * bound
    others = {
        "next element": z.roll(1),
        "next block": z.roll(kind.elements_per_block),
        "next direction": noise(kind, seed=1, stream=2, direction=1, **where).double(),
        "next stream": noise(kind, seed=1, stream=3, direction=0, **where).double(),
        "next seed": noise(kind, seed=2, stream=2, direction=0, **where).double(),
        "seed, high word": noise(kind, seed=1 + 2**32, stream=2, direction=0, **where).double(),
    }
    for name, other in others.items():
        assert abs((z * other).mean()) < bound, name


def test_gaussian_tail_and_distribution() -> None:
    z = noise(Kind.GAUSSIAN, seed=3, stream=4, direction=0, start=0, count=1 << 20)
    assert 4.4 < z.abs().max() < 6.77
    ordered = z.double().sort().values
    cdf = torch.special.ndtr(ordered)
    steps = (torch.arange(z.numel(), dtype=torch.float64) + 0.5) / z.numel()
    assert (cdf - steps).abs().max() < 2 / z.numel() ** 0.5  # Kolmogorov-Smirnov


@pytest.mark.parametrize("kind", KINDS)
def test_directions_in_one_call(kind: Kind) -> None:
    together = noise_of_directions(kind, seed=2**63, stream=9, directions=3, count=1000)
    for direction, row in enumerate(together):
        where = {"seed": 2**63, "stream": 9, "direction": direction, "start": 0, "count": 1000}
        assert torch.equal(row, noise(kind, **where))


def test_out_is_filled_in_place_and_checked() -> None:
    out = torch.empty(3, 5)
    made = noise(Kind.GAUSSIAN, seed=1, stream=1, direction=1, start=0, count=15, out=out)
    assert made.data_ptr() == out.data_ptr()
    with pytest.raises(ValueError, match="contiguous float32 tensor of 15"):
        noise(
            Kind.GAUSSIAN, seed=1, stream=1, direction=1, start=0, count=15, out=torch.empty(5, 3).T
        )


@pytest.mark.parametrize(
    "change", [{"seed": -1}, {"seed": 2**64}, {"stream": 2**32}, {"direction": -1}, {"start": -1}]
)
def test_arguments_out_of_range_are_refused(change: dict[str, int]) -> None:
    where = {"seed": 0, "stream": 0, "direction": 0, "start": 0, "count": 4} | change
    with pytest.raises(ValueError, match="must be"):
        noise(Kind.GAUSSIAN, **where)


def test_seed_zero_is_a_seed_and_steps_differ() -> None:
    seeds = {step_seed(0, step) for step in range(1000)} | {step_seed(1, 0)}
    assert len(seeds) == 1001


def test_colliding_names_get_streams_of_their_own() -> None:
    # "plumless" and "buckeroo" share a CRC-32.
    streams = assign_streams(["plumless", "buckeroo", "other"])
    assert len(set(streams.values())) == 3
    assert streams == assign_streams(["other", "buckeroo", "plumless", "other"])
    assert streams["buckeroo"] == assign_streams(["buckeroo"])["buckeroo"]
    families = [{stream ^ factor for factor in Factor} for stream in streams.values()]
    assert len(set.union(*families)) == 3 * len(Factor)
