"""A manifest and its segments in one file: what is written is read, and nothing else is."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile

import pytest

from entidb.errors import ProtocolError, SyncCodecError
from entidb.protocol import Manifest, SegmentInfo, encode_segment
from entidb.protocol.archives import MANIFEST_NAME, Archive, write_archive
from entidb.testing.fuzz import garbled
from tests.protocol.test_segments import columns_of, many

ROWS = many(90)
FILES = [encode_segment("notes", columns_of(ROWS[at : at + 30]), "gzip") for at in (0, 30, 60)]
SEGMENTS = [
    SegmentInfo(
        hashlib.sha256(data).digest(),
        0,
        len(data),
        30,
        ROWS[30 * at][0],
        ROWS[30 * at + 29][0],
        "gzip",
    )
    for at, data in enumerate(FILES)
]
BY_NAME = {each.sha256: data for each, data in zip(SEGMENTS, FILES, strict=True)}
MANIFEST = Manifest(
    history=b"h" * 16,
    head=90,
    floor=3,
    collections=["notes"],
    segments=SEGMENTS,
    entities=90,
    ends=0,
    time=0,
)


def archive() -> bytes:
    file = io.BytesIO()
    write_archive(file, MANIFEST, lambda segment: BY_NAME[segment.sha256])
    return file.getvalue()


def test_what_is_written_is_read_in_any_order():
    found = Archive(io.BytesIO(archive()))
    assert found.manifest == MANIFEST
    for segment in (*SEGMENTS[::-1], *SEGMENTS):
        assert found.segment(segment) == BY_NAME[segment.sha256]


def test_the_same_image_makes_the_same_file_and_any_tar_lists_it():
    assert archive() == archive()
    with tarfile.open(fileobj=io.BytesIO(archive())) as tar:
        names = [f"segments/{each.sha256.hex()}" for each in SEGMENTS]
        assert tar.getnames() == [MANIFEST_NAME, *names]


def test_a_segment_that_was_changed_or_left_out_is_refused():
    changed = {**BY_NAME, SEGMENTS[1].sha256: FILES[1][:-1] + b"x"}
    file = io.BytesIO()
    write_archive(file, MANIFEST, lambda segment: changed[segment.sha256])
    file.seek(0)
    found = Archive(file)
    assert found.segment(SEGMENTS[0]) == FILES[0]
    with pytest.raises(SyncCodecError, match="damaged"):
        found.segment(SEGMENTS[1])
    short = Archive(io.BytesIO(archive()[: 512 * 4]))
    with pytest.raises(SyncCodecError):
        short.segment(SEGMENTS[2])


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 5000, b"\0" * 10240, b"EntiDB-segment" + bytes(600)],
    ids=["nothing", "letters", "an empty tar", "a segment"],
)
def test_what_is_no_snapshot_is_refused(data: bytes):
    with pytest.raises(SyncCodecError, match="no snapshot"):
        Archive(io.BytesIO(data))


@pytest.mark.parametrize(
    "kind",
    [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE],
)
def test_a_tar_of_headers_about_headers_without_end_is_refused(kind: bytes):
    about = tarfile.TarInfo("a long name")
    about.type, about.size = kind, 4
    one = about.tobuf(tarfile.GNU_FORMAT) + b"abc\0".ljust(tarfile.BLOCKSIZE, b"\0")
    with pytest.raises(SyncCodecError):
        Archive(io.BytesIO(one * 3000))
    whole = archive()
    end = whole.index(b"segments/")
    begun = Archive(io.BytesIO(whole[:end] + one * 3000))
    with pytest.raises(SyncCodecError):
        begun.segment(begun.manifest.segments[0])


def test_a_tar_whose_manifest_is_a_link_or_huge_is_refused():
    for change in ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, {"size": 1 << 40}):
        about = tarfile.TarInfo(MANIFEST_NAME)
        for name, value in change.items():
            setattr(about, name, value)
        with pytest.raises(SyncCodecError):
            Archive(io.BytesIO(about.tobuf() + bytes(2048)))


@pytest.mark.parametrize("seed", range(20))
def test_a_garbled_archive_is_refused_or_gives_what_the_manifest_says(seed: int):
    rng = random.Random(seed)
    for _ in range(20):
        broken = garbled(archive(), rng)
        try:
            found = Archive(io.BytesIO(broken))
            for segment in found.manifest.segments:
                data = found.segment(segment)
                assert hashlib.sha256(data).digest() == segment.sha256
        except (ProtocolError, SyncCodecError):
            continue
