"""The two JSON files of a store: how they are written, and how hostile ones are refused.

A file is two lines: an envelope (kind, version, body length, checksum) and the body.  ``Layout``
is written once and says where every extent lies; ``CommitRecord`` replaces its predecessor
at each commit and says which extents are valid.  Parsing trusts nothing: a file that is not
exactly what a store writes gives a ``StoreFormatError`` naming file and reason.  No torch.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, final, get_args

import xxhash

from .errors import StoreFormatError
from .pool import PAGE_BYTES, round_up
from .strict_json import parse_json

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]
Durability = Literal["step", "checkpoint", "none"]

FORMAT_VERSION = 1
LAYOUT_NAME = "layout.json"
COMMIT_NAME = "commit.json"
PREVIOUS_NAME = "previous.json"
EXTENTS_NAME = "extents.bin"
BLOB_NAMES = ("blobs.0.bin", "blobs.1.bin")
# Extents begin behind two pages of stamps; see ``stamp``.
EXTENTS_START_BYTES = 2 * PAGE_BYTES
_MAX_FILE_BYTES = 1 << 28
_MAX_COUNT = 1 << 62
_ENVELOPE_BYTES = 4096
_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_STORE_ID = re.compile(r"[0-9a-f]{32}")


def checksum_of(data: bytes | memoryview) -> str:
    """Return the xxh3-64 of some bytes as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def refuse(path: Path, reason: str) -> NoReturn:
    """Raise the error that names a damaged, foreign or hostile file."""
    raise StoreFormatError(f"{path}: {reason}")


# Envelope #


def encode(kind: str, body: Mapping[str, JSON]) -> bytes:
    """Return the file's bytes; ``ValueError`` if the body is not plain JSON (NaN included)."""
    text = json.dumps(body, allow_nan=False, ensure_ascii=True, separators=(",", ":")).encode()
    envelope = {
        "headrace": kind,
        "version": FORMAT_VERSION,
        "nbytes": len(text),
        "xxh3_128": xxhash.xxh3_128_hexdigest(text),
    }
    return json.dumps(envelope).encode() + b"\n" + text + b"\n"


def decode(kind: str, data: bytes, path: Path) -> dict[str, Any]:
    """Return the body of a file that ``encode`` wrote, or raise ``StoreFormatError``."""
    line, newline, rest = data.partition(b"\n")
    if not newline or len(line) > _ENVELOPE_BYTES:
        refuse(path, "it is truncated or not a Headrace file: the first line is no envelope")
    try:
        envelope = parse_json(line)
    except ValueError as error:
        refuse(path, f"it is damaged or not a Headrace file: {error}")
    if not isinstance(envelope, dict) or envelope.get("headrace") != kind:
        refuse(path, f"it is not a Headrace {kind}")
    if envelope.get("version") != FORMAT_VERSION:
        refuse(
            path,
            f"it has format version {envelope.get('version')!r}; this program reads "
            f"{FORMAT_VERSION}. Use the version of Headrace that wrote it",
        )
    if envelope.get("nbytes") != len(rest) - 1 or not rest.endswith(b"\n"):
        refuse(
            path,
            f"it is truncated or has foreign bytes behind it: {len(rest) - 1:,} bytes of body, "
            f"{envelope.get('nbytes')!r} promised",
        )
    text = rest[:-1]
    if envelope.get("xxh3_128") != xxhash.xxh3_128_hexdigest(text):
        refuse(path, "its checksum does not match: bits have changed since it was written")
    try:
        body = parse_json(text)
    except ValueError as error:
        refuse(path, f"its body is not JSON: {error}")
    if not isinstance(body, dict):
        refuse(path, "its body is not a JSON object")
    return body


def read_small_file(path: Path) -> bytes:
    """Read a JSON file of a store; links, devices, pipes and oversized files are refused."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        refuse(path, f"it cannot be opened as a plain file ({error.strerror})")
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            refuse(path, "it is not a regular file")
        if status.st_size > _MAX_FILE_BYTES:
            refuse(path, f"it is oversized: {status.st_size:,} bytes, at most {_MAX_FILE_BYTES:,}")
        return file.read(_MAX_FILE_BYTES + 1)


# Fields #


@final
class Fields:
    """Typed access to one JSON object; every complaint names the file and the place in it."""

    def __init__(self, value: Any, path: Path, where: str) -> None:
        self._path = path
        self._where = where
        if not isinstance(value, dict):
            self.refuse(f"is {type(value).__name__}, an object is wanted")
        self._value: dict[str, Any] = value

    def refuse(self, reason: str) -> NoReturn:
        refuse(self._path, f"{self._where} {reason}")

    def get(self, key: str) -> Any:
        if key not in self._value:
            self.refuse(f"lacks {key!r}")
        return self._value[key]

    def integer(self, key: str, *, least: int = 0, most: int = _MAX_COUNT) -> int:
        value = self.get(key)
        # bool is an int in Python; a store never writes one for a number.
        if type(value) is not int:
            self.refuse(f"has {key!r} of type {type(value).__name__}, an integer is wanted")
        if not least <= value <= most:
            self.refuse(f"has {key!r} = {value}, outside {least} to {most}")
        return value

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.get(key)
        if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
            self.refuse(f"has {key!r} = {value!r:.80}, which is no valid text for it")
        return value

    def items(self, key: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list):
            self.refuse(f"has {key!r} of type {type(value).__name__}, a list is wanted")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.get(key)
        if not isinstance(value, dict):
            self.refuse(f"has {key!r} of type {type(value).__name__}, an object is wanted")
        return value


# Layout #


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece of an extent: ``nbytes`` (a multiple of 4096) in one member's file."""

    member: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """A region's true size and the segments of each of its extents."""

    name: str
    nbytes: int
    extents: tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What never changes in a store: identity, member file sizes, and where extents lie."""

    store_id: str
    durability: Durability
    snapshot_every: int
    fingerprint: Mapping[str, JSON]
    meta: JSON
    member_bytes: tuple[int, ...]
    regions: tuple[RegionLayout, ...]

    def to_body(self) -> dict[str, JSON]:
        """Return the JSON body that ``from_body`` reads."""
        return {
            "store_id": self.store_id,
            "durability": self.durability,
            "snapshot_every": self.snapshot_every,
            "fingerprint": dict(self.fingerprint),
            "meta": self.meta,
            "member_bytes": list(self.member_bytes),
            "regions": [
                {
                    "name": region.name,
                    "nbytes": region.nbytes,
                    "extents": [
                        [[s.member, s.offset, s.nbytes] for s in extent]
                        for extent in region.extents
                    ],
                }
                for region in self.regions
            ],
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any], path: Path) -> Self:
        """Check a parsed body to the last number."""
        fields = Fields(body, path, "the layout")
        durability = fields.text("durability")
        if durability not in get_args(Durability):
            fields.refuse(f"has durability {durability!r}")
        members = fields.items("member_bytes")
        for index, nbytes in enumerate(members):
            if type(nbytes) is not int or not EXTENTS_START_BYTES <= nbytes <= _MAX_COUNT:
                fields.refuse(f"gives member {index} the size {nbytes!r:.40}")
        if not members:
            fields.refuse("has no members")
        extent_count = 1 if durability == "none" else 2
        regions = tuple(
            _region(Fields(entry, path, f"region {index}"), extent_count, members)
            for index, entry in enumerate(fields.items("regions"))
        )
        _check_names(regions, path)
        _check_overlaps(regions, path)
        return cls(
            store_id=fields.text("store_id", _STORE_ID),
            durability=durability,  # type: ignore[arg-type]
            snapshot_every=fields.integer("snapshot_every", least=1),
            fingerprint=fields.mapping("fingerprint"),
            meta=fields.get("meta"),
            member_bytes=tuple(members),
            regions=regions,
        )


def _region(fields: Fields, extent_count: int, members: list[int]) -> RegionLayout:
    name = fields.text("name")
    nbytes = fields.integer("nbytes", least=1)
    extents = fields.items("extents")
    if len(extents) != extent_count:
        fields.refuse(f"({name!r}) has {len(extents)} extents, {extent_count} are wanted")
    parsed = []
    for extent in extents:
        if not isinstance(extent, list) or not extent:
            fields.refuse(f"({name!r}) has an extent that is no list of segments")
        parsed.append(tuple(_segment(fields, name, item, members) for item in extent))
        if sum(segment.nbytes for segment in parsed[-1]) != round_up(nbytes):
            fields.refuse(f"({name!r}) has an extent whose segments do not add up to its size")
    return RegionLayout(name, nbytes, tuple(parsed))


def _segment(fields: Fields, name: str, item: Any, members: list[int]) -> Segment:
    if not isinstance(item, list) or len(item) != 3 or any(type(n) is not int for n in item):
        fields.refuse(f"({name!r}) has a segment that is not [member, offset, nbytes]")
    member, offset, nbytes = item
    if not 0 <= member < len(members):
        fields.refuse(f"({name!r}) names member {member}, there are {len(members)}")
    if offset % PAGE_BYTES or nbytes % PAGE_BYTES or nbytes <= 0:
        fields.refuse(f"({name!r}) has a segment off the {PAGE_BYTES}-byte grid: {item}")
    if offset < EXTENTS_START_BYTES or offset + nbytes > members[member]:
        fields.refuse(
            f"({name!r}) has a segment out of range: {nbytes:,} bytes at {offset:,} of a "
            f"{members[member]:,}-byte file"
        )
    return Segment(member, offset, nbytes)


def _check_names(regions: Sequence[RegionLayout], path: Path) -> None:
    seen: set[str] = set()
    for region in regions:
        if not region.name or region.name in seen:
            refuse(path, f"the region name {region.name!r} is empty or appears twice")
        seen.add(region.name)


def _check_overlaps(regions: Sequence[RegionLayout], path: Path) -> None:
    spans = sorted(
        (segment.member, segment.offset, segment.nbytes, region.name)
        for region in regions
        for extent in region.extents
        for segment in extent
    )
    for (member, offset, nbytes, name), (member2, offset2, _, name2) in pairwise(spans):
        if member == member2 and offset + nbytes > offset2:
            refuse(path, f"regions {name!r} and {name2!r} overlap at byte {offset2:,}")


# Commit record #


@dataclass(frozen=True, slots=True)
class Valid:
    """Which extent of a region holds the committed bytes, and their checksum."""

    extent: int
    checksum: str


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """Where one blob lies in the record's blob file."""

    offset: int
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """One committed state: ``sequence`` counts records, ``step`` counts commits."""

    store_id: str
    sequence: int
    step: int
    user: JSON
    regions: Mapping[str, Valid]
    blob_file: str
    blobs: Mapping[str, BlobEntry]

    def to_body(self) -> dict[str, JSON]:
        """Return the JSON body that ``from_body`` reads."""
        return {
            "store_id": self.store_id,
            "sequence": self.sequence,
            "step": self.step,
            "user": self.user,
            "regions": {name: [v.extent, v.checksum] for name, v in self.regions.items()},
            "blob_file": self.blob_file,
            "blobs": {
                name: [entry.offset, entry.nbytes, entry.checksum]
                for name, entry in self.blobs.items()
            },
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any], layout: Layout, path: Path) -> Self:
        """Check a parsed body against the layout it belongs to."""
        fields = Fields(body, path, "the commit record")
        store_id = fields.text("store_id", _STORE_ID)
        if store_id != layout.store_id:
            fields.refuse(f"belongs to store {store_id}, the layout to {layout.store_id}")
        extents = {region.name: len(region.extents) for region in layout.regions}
        regions = {}
        for name, item in fields.mapping("regions").items():
            if name not in extents:
                fields.refuse(f"names region {name!r:.200}, which the layout does not have")
            regions[name] = _valid(fields, name, item, extents[name])
        blob_file = fields.text("blob_file")
        if blob_file not in BLOB_NAMES:
            fields.refuse(f"names blob file {blob_file!r:.200}; only {BLOB_NAMES} may be named")
        blobs = {name: _blob(fields, name, item) for name, item in fields.mapping("blobs").items()}
        return cls(
            store_id=store_id,
            sequence=fields.integer("sequence", least=1),
            step=fields.integer("step", least=1),
            user=fields.get("user"),
            regions=regions,
            blob_file=blob_file,
            blobs=blobs,
        )


def _valid(fields: Fields, name: str, item: Any, extent_count: int) -> Valid:
    if not isinstance(item, list) or len(item) != 2:
        fields.refuse(f"has region {name!r:.200} without [extent, checksum]")
    extent, checksum = item
    if type(extent) is not int or not 0 <= extent < extent_count:
        fields.refuse(f"gives region {name!r:.200} the extent {extent!r:.40}")
    if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
        fields.refuse(f"gives region {name!r:.200} the checksum {checksum!r:.40}")
    return Valid(extent, checksum)


def _blob(fields: Fields, name: str, item: Any) -> BlobEntry:
    if not isinstance(item, list) or len(item) != 3:
        fields.refuse(f"has blob {name!r:.200} without [offset, nbytes, checksum]")
    offset, nbytes, checksum = item
    for number in (offset, nbytes):
        if type(number) is not int or not 0 <= number <= _MAX_COUNT:
            fields.refuse(f"gives blob {name!r:.200} the range {offset!r:.40}, {nbytes!r:.40}")
    if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
        fields.refuse(f"gives blob {name!r:.200} the checksum {checksum!r:.40}")
    return BlobEntry(offset, nbytes, checksum)
