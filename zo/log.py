"""The replay log: one checksummed, fsynced record a step, written before the update is applied.

The log *is* the fine-tune: base weights plus this file rebuild the model exactly.  Layout, all
little-endian::

    magic     8 bytes   b"HRZOLOG1"
    length    u32       bytes of the header text
    header    JSON      {"base": fingerprint, "settings": {...}, "losses": n, "grads": n}
    checksum  u64       xxh3-64 of everything before it
    records   each      step u64, seed u64, batch u64, lr f64, eps f64, flags u32, zero u32,
                        losses f64[n], grads f32[n], padding to 8 bytes, checksum u64

A record's checksum covers the previous checksum and its own bytes, so that records cannot be
dropped, swapped or taken from another log.  All records have one size.  A torn tail (the process
died while it wrote the last record) is cut off with a warning; damage before the last record is
refused, because no crash of ours can cause it.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import xxhash

from ..offload.errors import StoreFormatError, StoreLockedError

MAGIC = b"HRZOLOG1"
MAX_HEADER_BYTES = 1 << 24
MAX_SCALARS = 1 << 13
FLAG_SKIPPED = 1
_FIXED = struct.Struct("<QQQddII")
_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything that a step's update depends on besides the base and the settings.

    >>> from headrace.zo import StepRecord
    >>> record = StepRecord(
    ...     step=0, seed=7, batch=0, lr=1e-3, eps=1e-3, losses=(1.5, 1.4), grads=(50.0,)
    ... )
    >>> record.skipped
    False
    """

    step: int
    seed: int
    batch: int
    lr: float
    eps: float
    losses: tuple[float, ...]
    """Members' losses, fp64."""
    grads: tuple[float, ...]
    """Projected grads after all controls, exactly as applied (fp32 numbers)."""
    skipped: bool = False
    """The losses held inf or NaN: nothing is applied."""


@dataclass(frozen=True, slots=True)
class LogHeader:
    """What a log belongs to and how its records are read."""

    base: str
    """Fingerprint of the base weights."""
    settings: Mapping[str, Any]
    """The method, as JSON values."""
    losses: int
    grads: int

    @property
    def record_bytes(self) -> int:
        """Size of a record on disk."""
        body = _FIXED.size + 8 * self.losses + 4 * self.grads
        return body + -body % 8 + _CHECKSUM.size


@final
class ReplayLog:
    """A log open for appending, held by one process (an exclusive lock on the file).

    ``create`` starts one; ``open`` continues one after cutting off a torn tail.  ``append`` returns
    when the record is on the medium.

    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import ZOSettings, ZOStep
    >>> model = nn.Linear(2, 1)
    >>> x, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> run = ZOStep(model, ZOSettings(lr=1e-2), log="run.log")
    >>> result = run.step(lambda m: float(((m(x) - y) ** 2).mean()))
    >>> run.close()
    >>> from headrace.zo import ReplayLog
    >>> log, records = ReplayLog.open("run.log")
    >>> log.header.record_bytes, len(records)
    (80, 1)
    >>> log.close()
    """

    def __init__(
        self, path: Path, descriptor: int, header: LogHeader, chain: int, last_step: int | None
    ) -> None:
        self._path = path
        self._descriptor = descriptor
        self._header = header
        self._chain = chain
        self._last_step = last_step

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: LogHeader) -> Self:
        """Start a log at ``path``, which must not exist."""
        target = Path(path)
        _check_counts(target, header.losses, header.grads)
        data = _header_bytes(header)
        # A name of its own until it is whole: no reader ever sees half a header.
        draft = target.with_name(f".{target.name}.{os.getpid()}.new")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, target)
            _write_all(descriptor, data, 0)
            os.fsync(descriptor)
            os.link(draft, target)
            _fsync_folder(target.parent)
        except FileExistsError as error:
            os.close(descriptor)
            raise FileExistsError(
                f"{target} exists; open it to continue, or give another path"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            draft.unlink()
        return cls(target, descriptor, header, _CHECKSUM.unpack(data[-8:])[0], None)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> tuple[Self, tuple[StepRecord, ...]]:
        """Open a log to continue it; returns it and the records it holds."""
        target = Path(path)
        descriptor = os.open(target, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(descriptor, target)
            data = _read_all(descriptor)
            header, records, good_bytes, chain = _parse(data, target)
            if good_bytes != len(data):
                os.ftruncate(descriptor, good_bytes)
                os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        last = records[-1].step if records else None
        return cls(target, descriptor, header, chain, last), records

    @property
    def header(self) -> LogHeader:
        """What the log belongs to."""
        return self._header

    def append(self, record: StepRecord) -> None:
        """Write one record and wait until it is on the medium."""
        if self._last_step is not None and record.step != self._last_step + 1:
            raise ValueError(
                f"{self._path} ends with step {self._last_step}; cannot append step {record.step}"
            )
        data = _record_bytes(record, self._header, self._chain)
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            _write_all(self._descriptor, data, end)
            os.fdatasync(self._descriptor)
        except BaseException:
            os.ftruncate(self._descriptor, end)
            raise
        self._chain = _CHECKSUM.unpack(data[-8:])[0]
        self._last_step = record.step

    def close(self) -> None:
        """Release the file and its lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_log(path: str | os.PathLike[str]) -> tuple[LogHeader, tuple[StepRecord, ...]]:
    """Read a log without changing or locking it; a torn tail is left out with a warning.

    >>> import torch
    >>> from torch import nn
    >>> from headrace.zo import ZOSettings, ZOStep
    >>> model = nn.Linear(2, 1)
    >>> x, y = torch.eye(2), torch.tensor([[1.0], [-1.0]])
    >>> run = ZOStep(model, ZOSettings(lr=1e-2), log="read.log")
    >>> result = run.step(lambda m: float(((m(x) - y) ** 2).mean()))
    >>> run.close()
    >>> from headrace.zo import read_log
    >>> header, records = read_log("read.log")
    >>> [record.step for record in records]
    [0]
    """
    target = Path(path)
    header, records, _, _ = _parse(target.read_bytes(), target)
    return header, records


def _header_bytes(header: LogHeader) -> bytes:
    text = json.dumps(
        {
            "base": header.base,
            "settings": dict(header.settings),
            "losses": header.losses,
            "grads": header.grads,
        },
        sort_keys=True,
        allow_nan=False,
    ).encode("utf-8")
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"log header takes {len(text)} bytes, at most {MAX_HEADER_BYTES}")
    data = MAGIC + struct.pack("<I", len(text)) + text
    return data + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(data))


def _record_bytes(record: StepRecord, header: LogHeader, chain: int) -> bytes:
    if (len(record.losses), len(record.grads)) != (header.losses, header.grads):
        raise ValueError(
            f"the log holds {header.losses} losses and {header.grads} projected grads a step, got "
            f"{len(record.losses)} and {len(record.grads)}"
        )
    flags = FLAG_SKIPPED if record.skipped else 0
    body = _FIXED.pack(record.step, record.seed, record.batch, record.lr, record.eps, flags, 0)
    body += struct.pack(f"<{header.losses}d", *record.losses)
    body += struct.pack(f"<{header.grads}f", *record.grads)
    body += bytes(-len(body) % 8)
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, seed=chain))


def _parse(data: bytes, path: Path) -> tuple[LogHeader, tuple[StepRecord, ...], int, int]:
    """Header, whole records, the bytes they take, and the last checksum."""
    header, begin, chain = _parse_header(data, path)
    size = header.record_bytes
    records: list[StepRecord] = []
    position = begin
    while position + size <= len(data):
        body = data[position : position + size - 8]
        stored = _CHECKSUM.unpack(data[position + size - 8 : position + size])[0]
        if xxhash.xxh3_64_intdigest(body, seed=chain) != stored:
            if len(data) - position - size >= size:
                raise StoreFormatError(
                    f"{path}: record {len(records)} at byte {position} does not match its checksum "
                    "and others follow it: the file is damaged; restore it from a copy"
                )
            break
        records.append(_parse_record(body, header, path, position, records))
        position, chain = position + size, stored
    if position != len(data):
        warnings.warn(
            f"{path}: the last {len(data) - position} bytes are not a whole record (the process "
            f"died while it wrote them); continuing after {len(records)} records",
            stacklevel=3,
        )
    return header, tuple(records), position, chain


def _parse_header(data: bytes, path: Path) -> tuple[LogHeader, int, int]:
    if data[: len(MAGIC)] != MAGIC or len(data) < len(MAGIC) + 4:
        raise StoreFormatError(f"{path} is not a zeroth-order replay log (bad magic)")
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    begin = len(MAGIC) + 4
    if length > MAX_HEADER_BYTES or begin + length + 8 > len(data):
        raise StoreFormatError(
            f"{path}: the header claims {length} bytes, the file has {len(data)}"
        )
    stored = _CHECKSUM.unpack_from(data, begin + length)[0]
    if xxhash.xxh3_64_intdigest(data[: begin + length]) != stored:
        raise StoreFormatError(f"{path}: the header does not match its checksum")
    try:
        fields = json.loads(data[begin : begin + length].decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise StoreFormatError(f"{path}: the header is not JSON: {error}") from error
    expected = {"base": str, "settings": dict, "losses": int, "grads": int}
    if not isinstance(fields, dict) or set(fields) != set(expected):
        raise StoreFormatError(f"{path}: the header must hold exactly {sorted(expected)}")
    for name, kind in expected.items():
        if type(fields[name]) is not kind:
            raise StoreFormatError(f"{path}: header field {name!r} must be {kind.__name__}")
    _check_counts(path, fields["losses"], fields["grads"])
    return LogHeader(**fields), begin + length + 8, stored


def _parse_record(
    body: bytes,
    header: LogHeader,
    path: Path,
    position: int,
    before: Sequence[StepRecord],
) -> StepRecord:
    step, seed, batch, lr, eps, flags, zero = _FIXED.unpack_from(body)
    losses = struct.unpack_from(f"<{header.losses}d", body, _FIXED.size)
    grads = struct.unpack_from(f"<{header.grads}f", body, _FIXED.size + 8 * header.losses)
    if flags & ~FLAG_SKIPPED or zero:
        raise StoreFormatError(
            f"{path}: record at byte {position} has unknown flags {flags:#x}/{zero:#x}: "
            "it was written by a newer version"
        )
    if before and step != before[-1].step + 1:
        raise StoreFormatError(
            f"{path}: record at byte {position} is step {step} after step {before[-1].step}"
        )
    return StepRecord(step, seed, batch, lr, eps, losses, grads, bool(flags & FLAG_SKIPPED))


def _check_counts(path: Path, losses: int, grads: int) -> None:
    if not (0 < losses <= MAX_SCALARS and 0 < grads <= MAX_SCALARS):
        raise StoreFormatError(
            f"{path}: losses and grads a step must be in 1 .. {MAX_SCALARS}, got {losses}, {grads}"
        )


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreLockedError(f"{path} is being written by another run") from error


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]


def _read_all(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    parts = []
    position = 0
    while position < size:
        part = os.pread(descriptor, size - position, position)
        if not part:
            break
        parts.append(part)
        position += len(part)
    return b"".join(parts)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
