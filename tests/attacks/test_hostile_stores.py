"""Store files that must be refused, each with an error that names the file and the reason.

Structural attacks carry correct checksums: they are what a hostile author writes, not what a
failing disk leaves.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from headrace.offload.errors import LaneError, StoreError, StoreFormatError
from headrace.offload.io import DiskLanes
from headrace.offload.record import decode, encode
from headrace.offload.store import Region, Store
from headrace.offload.timeline import Timeline

SIZES = {"weights/0": 20_000, "states/0": 5000, "weights/1": 4096}
Body = dict[str, Any]


def content(name: str, step: int) -> bytes:
    return random.Random(f"{name} {step}").randbytes(SIZES[name])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store after three steps, and beside it copies after the first and second."""
    root = tmp_path_factory.mktemp("pristine")
    folder = root / "3"
    regions = [Region(name, nbytes) for name, nbytes in SIZES.items()]
    with (
        DiskLanes(timeline=Timeline()) as lanes,
        Store.create(
            [folder],
            regions,
            durability="step",
            fingerprint={"model": "tiny"},
            meta={"dtype": "bf16"},
            lanes=lanes,
        ) as store,
    ):
        for step in (1, 2, 3):
            for name in SIZES:
                store.write(name, memoryview(content(name, step)))
            store.commit({"step": step}, blobs={"rng": bytes([step]) * 100})
            if step < 3:
                shutil.copytree(folder, root / str(step))
    return root


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine / "3", tmp_path / "run"))


def open_and_read(folder: Path) -> None:
    with DiskLanes(timeline=Timeline()) as lanes, Store.open([folder], lanes=lanes) as store:
        for name in SIZES:
            view = memoryview(bytearray(SIZES[name]))
            store.read(name, view).wait()
            assert view == content(name, 3)
        assert store.last_blobs == {"rng": bytes([3]) * 100}


def rewrite(path: Path, change: Callable[[Body], None]) -> None:
    """Change a file's body and give it a correct envelope again."""
    kind = {"layout.json": "layout", "commit.json": "commit"}[path.name]
    body = decode(kind, path.read_bytes(), path)
    change(body)
    path.write_bytes(encode(kind, body))


def test_the_pristine_store_is_accepted(folder: Path) -> None:
    open_and_read(folder)


def _set(*keys: Any, to: Any) -> Callable[[Body], None]:
    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = to

    return change


def _drop(*keys: Any) -> Callable[[Body], None]:
    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        del body[keys[-1]]

    return change


def _overlap(body: Body) -> None:
    body["regions"][1]["extents"][0][0][1] = body["regions"][0]["extents"][0][0][1]


LAYOUT_ATTACKS: dict[str, tuple[Callable[[Body], None], str]] = {
    "overlapping": (_overlap, "overlap"),
    "own extents overlap": (
        lambda body: body["regions"][0].update(extents=[body["regions"][0]["extents"][0]] * 2),
        "overlap",
    ),
    "out of range": (_set("regions", 0, "extents", 0, 0, 1, to=1 << 40), "out of range"),
    "over the stamps": (_set("regions", 0, "extents", 0, 0, 1, to=0), "out of range"),
    "negative offset": (_set("regions", 0, "extents", 0, 0, 1, to=-4096), "out of range"),
    "off the grid": (_set("regions", 0, "extents", 0, 0, 1, to=8193), "grid"),
    "oversized": (_set("regions", 0, "nbytes", to=1 << 61), "do not add up"),
    "huge number": (_set("regions", 0, "nbytes", to=1 << 200), "outside"),
    "undersized": (_set("regions", 0, "nbytes", to=1), "do not add up"),
    "zero bytes": (_set("regions", 0, "nbytes", to=0), "outside"),
    "number as text": (_set("regions", 0, "nbytes", to="20000"), "integer is wanted"),
    "number as float": (_set("regions", 0, "nbytes", to=20000.0), "integer is wanted"),
    "number as bool": (_set("regions", 0, "nbytes", to=True), "integer is wanted"),
    "unknown member": (_set("regions", 0, "extents", 0, 0, 0, to=7), "member 7"),
    "no members": (_set("member_bytes", to=[]), "no members"),
    "member of no size": (_set("member_bytes", 0, to=-1), "size -1"),
    "other size": (_set("member_bytes", 0, to=1 << 30), "truncated or belongs"),
    "name twice": (_set("regions", 1, "name", to="weights/0"), "appears twice"),
    "no name": (_set("regions", 1, "name", to=""), "empty"),
    "one extent": (lambda body: body["regions"][0]["extents"].pop(), "1 extents, 2"),
    "no segments": (_set("regions", 0, "extents", 0, to=[]), "no list of segments"),
    "half a segment": (_set("regions", 0, "extents", 0, 0, to=[0, 8192]), "not .member"),
    "unknown durability": (_set("durability", to="forever"), "durability 'forever'"),
    "other store": (_set("store_id", to="0" * 32), "belongs to store"),
    "odd store id": (_set("store_id", to="../../etc"), "store_id"),
    "never a snapshot": (_set("snapshot_every", to=0), "snapshot_every"),
    "fingerprint of no keys": (_set("fingerprint", to=[1]), "fingerprint"),
    "regions as object": (_set("regions", to={}), "list is wanted"),
    "region as text": (_set("regions", 0, to="weights/0"), "object is wanted"),
    "missing field": (_drop("meta"), "lacks 'meta'"),
    "missing region": (_drop("regions", 2), "does not have"),
}

COMMIT_ATTACKS: dict[str, tuple[Callable[[Body], None], str]] = {
    "path-escaping": (_set("blob_file", to="../../../etc/passwd"), "only"),
    "absolute path": (_set("blob_file", to="/etc/passwd"), "only"),
    "other own file": (_set("blob_file", to="extents.bin"), "only"),
    "unknown region": (_set("regions", "weights/9", to=[0, "0" * 16]), "weights/9"),
    "extent out of range": (_set("regions", "weights/0", 0, to=2), "extent 2"),
    "negative extent": (_set("regions", "weights/0", 0, to=-1), "extent -1"),
    "extent as bool": (_set("regions", "weights/0", 0, to=True), "extent True"),
    "checksum as number": (_set("regions", "weights/0", 1, to=5), "checksum 5"),
    "checksum of odd length": (_set("regions", "weights/0", 1, to="abc"), "checksum 'abc'"),
    "region without checksum": (_set("regions", "weights/0", to=[0]), "extent, checksum"),
    "regions as list": (_set("regions", to=[]), "object is wanted"),
    "blob out of range": (_set("blobs", "rng", 1, to=1 << 50), "truncated"),
    "blob of negative size": (_set("blobs", "rng", 1, to=-1), "range"),
    "blob as text": (_set("blobs", "rng", to="rng"), "offset, nbytes, checksum"),
    "blob moved": (_set("blobs", "rng", 0, to=1), "truncated"),
    "other store": (_set("store_id", to="f" * 32), "belongs to store"),
    "no step": (_set("step", to=0), "step"),
    "step as text": (_set("step", to="3"), "integer is wanted"),
    "stale sequence": (_set("sequence", to=1), "stale copy"),
    "future sequence": (_set("sequence", to=9), "stale copy"),
    "missing user data": (_drop("user"), "lacks 'user'"),
}


@pytest.mark.parametrize("name", LAYOUT_ATTACKS)
def test_hostile_layouts(folder: Path, name: str) -> None:
    change, reason = LAYOUT_ATTACKS[name]
    rewrite(folder / "layout.json", change)
    with pytest.raises(StoreFormatError, match=reason) as caught:
        open_and_read(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", COMMIT_ATTACKS)
def test_hostile_commit_records(folder: Path, name: str) -> None:
    change, reason = COMMIT_ATTACKS[name]
    rewrite(folder / "commit.json", change)
    with pytest.raises(StoreFormatError, match=reason) as caught:
        open_and_read(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("file", ["layout.json", "commit.json"])
@pytest.mark.parametrize("keep", [0, 1, 50, 200, -1, -2])
def test_truncated_files(folder: Path, file: str, keep: int) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:keep])
    with pytest.raises(StoreFormatError, match=re.escape(str(folder / file))):
        open_and_read(folder)


@pytest.mark.parametrize("file", ["layout.json", "commit.json"])
def test_every_flipped_bit_of_a_record_is_found(folder: Path, file: str) -> None:
    path = folder / file
    data = path.read_bytes()
    chance = random.Random(0)
    for position in chance.sample(range(len(data)), 60):
        for bit in (0, 5):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(StoreFormatError, match=file):
                open_and_read(folder)


def test_bits_flipped_in_the_bytes(folder: Path) -> None:
    path = folder / "extents.bin"
    layout = decode("layout", (folder / "layout.json").read_bytes(), folder / "layout.json")
    record = decode("commit", (folder / "commit.json").read_bytes(), folder / "commit.json")
    for region in layout["regions"]:
        [[_, offset, _]] = region["extents"][record["regions"][region["name"]][0]]
        data = bytearray(path.read_bytes())
        data[offset + region["nbytes"] - 1] ^= 128
        damaged = folder.with_name("damaged " + region["name"].replace("/", "-"))
        shutil.copytree(folder, damaged)
        (damaged / "extents.bin").write_bytes(data)
        with pytest.raises(LaneError, match=rf"extents\.bin: region '{region['name']}'"):
            open_and_read(damaged)


def test_bits_flipped_in_a_blob(folder: Path) -> None:
    blob_file = (
        folder / json.loads((folder / "commit.json").read_text().splitlines()[1])["blob_file"]
    )
    data = bytearray(blob_file.read_bytes())
    data[50] ^= 1
    blob_file.write_bytes(data)
    with pytest.raises(StoreFormatError, match=rf"{blob_file}.*'rng'.*checksum"):
        open_and_read(folder)


@pytest.mark.parametrize("nbytes", [0, 100, 8192, 20_000])
def test_truncated_extents(folder: Path, nbytes: int) -> None:
    os.truncate(folder / "extents.bin", nbytes)
    with pytest.raises(StoreError, match=r"extents\.bin"):
        open_and_read(folder)


@pytest.mark.parametrize("file", ["layout.json", "extents.bin", "commit.json"])
def test_missing_files(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(StoreError, match=re.escape(str(folder))):
        open_and_read(folder)


def test_a_missing_blob_file(folder: Path) -> None:
    for name in ("blobs.0.bin", "blobs.1.bin"):
        (folder / name).unlink()
    with pytest.raises(StoreFormatError, match=r"blobs\.\d\.bin"):
        open_and_read(folder)


@pytest.mark.parametrize(
    ("file", "step"), [("commit.json", 1), ("extents.bin", 1), ("extents.bin", 2)]
)
def test_stale_copies_of_one_file(folder: Path, pristine: Path, file: str, step: int) -> None:
    shutil.copy(pristine / str(step) / file, folder / file)
    with pytest.raises(StoreFormatError, match=r"extents\.bin: .*stale copy"):
        open_and_read(folder)


def test_a_record_one_commit_old_opens_only_where_its_bytes_are_intact(
    folder: Path, pristine: Path
) -> None:
    """It is what a crash inside the third commit leaves; step 4's writes then destroy step 2."""
    with DiskLanes(timeline=Timeline()) as lanes:
        with Store.open([folder], lanes=lanes) as store:
            store.write("states/0", memoryview(content("states/0", 4))).wait()
        shutil.copy(pristine / "2" / "commit.json", folder / "commit.json")
        view = memoryview(bytearray(20_000))
        with Store.open([folder], lanes=lanes) as store:
            assert store.step == 2
            store.read("weights/0", view).wait()
            assert view == content("weights/0", 2)
            with pytest.raises(LaneError, match=r"region 'states/0'.*checksum"):
                store.read("states/0", view).wait()


@pytest.mark.parametrize("file", ["layout.json", "commit.json", "extents.bin", "lock"])
def test_links_are_not_followed(folder: Path, tmp_path: Path, file: str) -> None:
    shutil.move(folder / file, tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=re.escape(str(folder / file))):
        open_and_read(folder)


@pytest.mark.parametrize("file", ["layout.json", "commit.json", "extents.bin", "lock"])
def test_pipes_do_not_hang(folder: Path, file: str) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(StoreError, match=re.escape(str(folder / file))):
        open_and_read(folder)


def test_oversized_files_are_not_read(folder: Path) -> None:
    os.truncate(folder / "commit.json", 1 << 40)  # sparse
    with pytest.raises(StoreFormatError, match=r"commit\.json: it is oversized"):
        open_and_read(folder)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x04\x95cos\nsystem\n", "not a Headrace file"),
        (b"PK\x03\x04" + bytes(100), "first line"),
        (b'{"headrace": "commit"}\n{}\n', "version None"),
        (b'{"headrace": "commit", "headrace": "layout"}\n{}\n', "twice"),
        (b"[" * 100_000 + b"\n", "first line"),
        (b'{"headrace": NaN}\n', "NaN"),
        (b"\xff\xfe\n", "not a Headrace file"),
        (b'{"headrace": "layout", "version": 1}\n{}\n', "not a Headrace commit"),
        (b'{"headrace": "commit", "version": 2}\n{}\n', "version 2"),
        (b'{"headrace": "commit", "version": 1, "nbytes": 2}\n{}\n', "checksum"),
    ],
)
def test_foreign_bytes(folder: Path, data: bytes, reason: str) -> None:
    (folder / "commit.json").write_bytes(data)
    with pytest.raises(StoreFormatError, match=rf"commit\.json: .*{reason}"):
        open_and_read(folder)


def test_deep_nesting_with_a_correct_checksum(folder: Path) -> None:
    text = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    envelope = {
        "headrace": "commit",
        "version": 1,
        "nbytes": len(text),
        "xxh3_128": xxhash.xxh3_128_hexdigest(text),
    }
    (folder / "commit.json").write_bytes(json.dumps(envelope).encode() + b"\n" + text + b"\n")
    with pytest.raises(StoreFormatError, match=r"commit\.json: .*nested"):
        open_and_read(folder)
