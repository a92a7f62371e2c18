"""Byte amounts as text, and default budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.budgets import available_host_bytes, default_budgets, format_bytes, parse_bytes
from headrace.errors import InputError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12GB", 12 * 10**9),
        ("12 gb", 12 * 10**9),
        ("12G", 12 * 10**9),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        (".5kB", 500),
        ("1TB", 10**12),
        ("2TiB", 2 << 40),
        ("7", 7),
        ("7B", 7),
        (123, 123),
    ],
)
def test_amounts(text: int | str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


def test_large_whole_amounts_keep_every_byte() -> None:
    assert parse_bytes(f"{2**60 + 1}B") == 2**60 + 1


@pytest.mark.parametrize(
    "bad", ["", "GB", "-1GB", "0", "1e9", "12 GBit", "nan", "inf", "1,5GB", 0, -5, True, 1.5, None]
)
def test_refused_amounts_name_the_option(bad: int | str) -> None:
    with pytest.raises(InputError, match="--host-budget is "):
        parse_bytes(bad, what="--host-budget")


def test_format() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 1_880_000_000, 5 * 10**15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.88 GB",
        "5,000 TB",
    ]


def fake_machine(
    root: Path, *, available_kib: int, limits: dict[str, tuple[str, int, int]]
) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available_kib} kB\n")
    deepest = max(limits, key=len, default="")
    (root / "proc/self/cgroup").write_text(f"0::/{deepest}\n")
    for name, (limit, used, cache) in limits.items():
        folder = root / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8 << 30),
        ({"box": ("max", 1, 0)}, 8 << 30),
        ({"box": (str(3 << 30), 1 << 30, 0)}, 2 << 30),
        ({"box": (str(3 << 30), 2 << 30, 1 << 30)}, 2 << 30),
        ({"box": (str(4 << 30), 1 << 30, 0), "box/job": (str(2 << 30), 1 << 30, 0)}, 1 << 30),
        ({"box": (str(1 << 30), 2 << 30, 0)}, 0),
    ],
)
def test_control_groups_bound_what_is_available(
    tmp_path: Path, limits: dict[str, tuple[str, int, int]], expected: int
) -> None:
    fake_machine(tmp_path, available_kib=8 << 20, limits=limits)
    found = available_host_bytes(proc=tmp_path / "proc", cgroup=tmp_path / "cgroup")
    assert found == expected


def test_on_the_cpu_both_tiers_share_host_memory() -> None:
    free = available_host_bytes()
    budgets = default_budgets("cpu")
    assert 0 < budgets.device_bytes + budgets.host_bytes < free * 1.2
    split = default_budgets("cpu", device_budget="64MiB")
    assert split.device_bytes == 64 << 20
    assert split.host_bytes > budgets.host_bytes
    both = default_budgets("cpu", device_budget="1GB", host_budget=5)
    assert (both.device_bytes, both.host_bytes) == (10**9, 5)
    assert (both.device_reason, both.host_reason) == ("given", "given")


def test_a_budget_that_leaves_nothing_for_the_other_is_refused() -> None:
    with pytest.raises(InputError, match="too little memory"):
        default_budgets("cpu", device_budget="900TB")
