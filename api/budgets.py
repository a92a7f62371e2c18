"""Byte amounts as people write them, and the budgets used when none are given.

A default budget is what is free now less a stated margin: on a GPU 10 % of its memory (at least
512 MiB) stays free for the CUDA context and for temporaries of the kernels; in host memory 20 %
of what is available (at least 1 GiB) stays free for Python, the libraries and the page cache.
On the CPU both tiers live in the same memory, so its usable part is halved between them.
No file but those of ``/proc`` and ``/sys`` is read, and nothing is allocated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

_UNITS = {
    "": 1,
    "B": 1,
    **{
        letter + suffix: base**power
        for power, letter in enumerate("KMGT", start=1)
        for suffix, base in (("", 1000), ("B", 1000), ("I", 1024), ("IB", 1024))
    },
}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def parse_bytes(amount: int | str, *, what: str = "the amount") -> int:
    """Return a number of bytes from an int or from text such as ``"12GB"`` or ``"512MiB"``.

    kB, MB, GB, TB (or k, M, G, T) count in thousands; KiB, MiB, GiB, TiB in 1024s; case does not
    matter.  ``what`` names the option in the error.

    >>> parse_bytes("12GB"), parse_bytes("512 MiB"), parse_bytes(4096)
    (12000000000, 536870912, 4096)
    >>> parse_bytes("twelve", what="--device-budget")
    Traceback (most recent call last):
        ...
    headrace.errors.InputError: --device-budget is 'twelve'; give bytes such as 12GB or 512MiB
    """
    if isinstance(amount, str):
        match = _AMOUNT.fullmatch(amount)
        unit = _UNITS.get(match.group(2).upper()) if match else None
        if match is None or unit is None:
            raise InputError(f"{what} is {amount!r}; give bytes such as 12GB or 512MiB")
        nbytes = (
            int(float(match.group(1)) * unit)
            if "." in match.group(1)
            else (int(match.group(1)) * unit)
        )
    elif isinstance(amount, int) and not isinstance(amount, bool):
        nbytes = amount
    else:
        raise InputError(f"{what} is {amount!r}; give bytes such as 12GB or 512MiB")
    if nbytes <= 0:
        raise InputError(f"{what} is {amount!r}; give more than 0 bytes")
    return nbytes


def format_bytes(nbytes: float) -> str:
    """Return bytes as short text in decimal units.

    >>> format_bytes(1234567890), format_bytes(999), format_bytes(0)
    ('1.23 GB', '999 B', '0 B')
    """
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"


def available_host_bytes(
    *, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the bytes of host memory that can be had now without swapping.

    The smaller of the kernel's ``MemAvailable`` and, where a control group limits this process,
    the room left under that limit (page cache counts as room: the kernel gives it up).
    """
    available = 0
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for folder in _cgroup_folders(proc, cgroup):
        limit, used, stat = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
        if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
            continue
        cache = 0
        if stat.is_file():
            fields = dict(line.split() for line in stat.read_text().splitlines())
            cache = int(fields.get("inactive_file", 0))
        available = min(available, int(limit.read_text()) - int(used.read_text()) + cache)
    return max(available, 0)


def _cgroup_folders(proc: Path, cgroup: Path) -> list[Path]:
    """Control-group folders (version 2) from the mount point down to this process's own."""
    record = proc / "self" / "cgroup"
    own = ""
    if record.is_file():
        for line in record.read_text().splitlines():
            if line.startswith("0::"):
                own = line[3:].strip("/")
    parts = [part for part in own.split("/") if part and part != ".."]
    return [cgroup.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


@dataclass(frozen=True, slots=True)
class Budgets:
    """Byte budgets of the device and of host memory, each with where it came from."""

    device_bytes: int
    host_bytes: int
    device_reason: str
    host_reason: str


def default_budgets(
    device: str,
    *,
    device_budget: int | str | None = None,
    host_budget: int | str | None = None,
) -> Budgets:
    """Return the budgets for a run on ``device`` (``"cpu"``, ``"cuda"``, ``"cuda:1"``).

    What is given is parsed; what is not is what is free less the margin that this module's first
    lines state.  On ``"cpu"`` the two share the host's memory: a default takes what the other
    leaves, or half of it when neither is given.

    >>> import headrace
    >>> budgets = headrace.default_budgets("cpu", device_budget="2GB", host_budget="4GB")
    >>> budgets.device_bytes, budgets.host_bytes
    (2000000000, 4000000000)
    """
    given_device = (
        None if device_budget is None else parse_bytes(device_budget, what="the device budget")
    )
    given_host = None if host_budget is None else parse_bytes(host_budget, what="the host budget")
    free_host = available_host_bytes()
    usable_host = max(free_host - max(free_host // 5, 1 << 30), 0)
    on_cpu = device == "cpu"
    if given_device is not None:
        device_bytes, device_reason = given_device, "given"
    elif on_cpu:
        device_bytes = usable_host // 2 if given_host is None else usable_host - given_host
        device_reason = f"a share of {format_bytes(free_host)} free host memory"
    else:
        free_device = _free_device_bytes(device)
        device_bytes = free_device - max(free_device // 10, 512 << 20)
        device_reason = f"{format_bytes(free_device)} free on {device}, less the margin"
    if given_host is not None:
        host_bytes, host_reason = given_host, "given"
    else:
        host_bytes = usable_host - device_bytes if on_cpu else usable_host
        host_reason = f"{format_bytes(free_host)} free host memory, less the margin"
    for tier, nbytes in (("device", device_bytes), ("host", host_bytes)):
        if nbytes <= 0:
            raise InputError(
                f"too little memory is free for a default {tier} budget "
                f"({format_bytes(free_host)} of host memory available); free some, or give "
                f"the {tier} budget in bytes"
            )
    return Budgets(device_bytes, host_bytes, device_reason, host_reason)


def _free_device_bytes(device: str) -> int:
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])
