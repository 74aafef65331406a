"""Each way in which a page can be wrong is found without mapping the file, and named."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from entidb.errors import CorruptionError, DatabaseLockedError, FormatError
from entidb.storage import LmdbStorage
from entidb.storage.lmdb.pages import _TreeWalk, closed_file_faults, ordinary_keys
from entidb.testing.contracts import read_all

PAGE = 4096
HEADER = struct.Struct("=QHHHH")
#: Where a header of the file holds what: bytes from the beginning of its page.
PAGE_SIZE_AT, FREE_FLAGS_AT, FREE_ROOT_AT = 40, 44, 80
MAIN_FLAGS_AT, MAIN_DEPTH_AT, MAIN_LEAVES_AT, MAIN_ROOT_AT = 92, 94, 104, 128
LAST_PAGE_AT, TRANSACTION_AT = 136, 144
BRANCH, LEAF, OVERFLOW = 1, 2, 4


@dataclass
class Image:
    """A data file in memory, whose numbers can be changed by place."""

    raw: bytearray
    newest: int = field(init=False)

    def __post_init__(self) -> None:
        #: The page of the newer header.
        self.newest = max((0, 1), key=lambda page: self.get(page, TRANSACTION_AT, "Q"))

    def get(self, page: int, at: int, kind: str = "H") -> int:
        found: int = struct.unpack_from("=" + kind, self.raw, page * PAGE + at)[0]
        return found

    def set(self, page: int, at: int, value: int, kind: str = "H") -> None:
        struct.pack_into("=" + kind, self.raw, page * PAGE + at, value)

    def header(self, at: int, kind: str = "Q") -> int:
        return self.get(self.newest, at, kind)

    def set_header(self, at: int, value: int, kind: str = "Q") -> None:
        self.set(self.newest, at, value, kind)

    @property
    def root(self) -> int:
        return self.header(MAIN_ROOT_AT)

    @property
    def free(self) -> int:
        """The one page that lists the free pages."""
        return self.header(FREE_ROOT_AT)

    def nodes(self, page: int) -> list[int]:
        return [self.get(page, at) for at in range(HEADER.size, self.get(page, 12), 2)]

    def child(self, number: int) -> int:
        """Of the root, which is a branch page."""
        at = self.nodes(self.root)[number]
        return self.get(self.root, at) | self.get(self.root, at + 2) << 16

    @property
    def leaf(self) -> int:
        return self.child(1)

    @property
    def big(self) -> tuple[int, int]:
        """The leaf with the value that has pages of its own, and the place of its node."""
        for number in range(len(self.nodes(self.root))):
            page = self.child(number)
            for at in self.nodes(page):
                if self.get(page, at + 4) & 1:
                    return page, at
        raise AssertionError("there is no large value")

    @property
    def overflow(self) -> int:
        page, at = self.big
        return self.get(page, at + 8 + self.get(page, at + 6), "Q")

    @property
    def list_at(self) -> int:
        """Where the newest list of free pages begins in its page."""
        return self.nodes(self.free)[-1] + 16


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with a branch, several leaves, a value on pages of its own, and free pages."""
    path = tmp_path_factory.mktemp("sound") / "db"
    with contextlib.closing(LmdbStorage.open(path)) as store:
        store.commit({b"%04d" % n: b"v" * 300 for n in range(100)})
        store.commit({b"0050big": b"b" * 50_000})
        store.commit({b"%04d" % n: None for n in range(60, 90)})
        store.commit({b"0001": b"changed"})
    raw = (path / "data.mdb").read_bytes()
    image = Image(bytearray(raw))
    assert image.get(image.root, 10) == BRANCH and len(image.nodes(image.root)) > 3
    return raw


def test_a_sound_file_has_no_faults(sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(sound)
    assert closed_file_faults(str(tmp_path / "data.mdb")) == []


def cut(size: int) -> Callable[[Image], None]:
    def harm(image: Image) -> None:
        del image.raw[size:]

    return harm


def copy_root_of_old_header(image: Image) -> None:
    image.set_header(MAIN_ROOT_AT, image.get(1 - image.newest, MAIN_ROOT_AT, "Q"))


def swap_children(image: Image) -> None:
    first, second = image.nodes(image.root)[1:3]
    a, b = image.get(image.root, first), image.get(image.root, second)
    image.set(image.root, first, b)
    image.set(image.root, second, a)


def double_child(image: Image) -> None:
    first, second = image.nodes(image.root)[1:3]
    image.set(image.root, second, image.get(image.root, first))


def swap_keys(image: Image) -> None:
    page = image.leaf
    first, second = (HEADER.size + 2 * n for n in (1, 2))
    a, b = image.get(page, first), image.get(page, second)
    image.set(page, first, b)
    image.set(page, second, a)


def in_leaf(at: int, value: Callable[[int], int]) -> Callable[[Image], None]:
    """Change the number at ``at`` of the head of a leaf's first node."""

    def harm(image: Image) -> None:
        place = image.nodes(image.leaf)[0] + at
        image.set(image.leaf, place, value(image.get(image.leaf, place)))

    return harm


def in_list(number: int, value: Callable[[Image], int]) -> Callable[[Image], None]:
    """Change a number of the newest list of free pages; the first says how many there are."""

    def harm(image: Image) -> None:
        image.set(image.free, image.list_at + 8 * number, value(image), "Q")

    return harm


def own_child(image: Image) -> None:
    at = image.nodes(image.free)[-1]
    image.set(image.free, 10, BRANCH)
    for place, number in ((0, image.free), (2, 0), (4, 0)):
        image.set(image.free, at + place, number)


def one_list(key_bytes: int, value_bytes: int) -> Callable[[Image], None]:
    """A page of the list of free pages with one node of such a size, and the commit in its key."""

    def harm(image: Image) -> None:
        commit, at = image.header(TRANSACTION_AT), PAGE - 8 - key_bytes - value_bytes
        image.set(image.free, HEADER.size, at)
        image.set(image.free, 12, HEADER.size + 2)
        image.set(image.free, 14, at)
        for place, number in ((0, value_bytes), (2, 0), (4, 0), (6, key_bytes)):
            image.set(image.free, at + place, number)
        image.set(image.free, at + 8, commit, "Q")

    return harm


HARMS: dict[str, tuple[Callable[[Image], None], str]] = {
    "cut in its first header": (cut(100), "shorter than its header"),
    "cut in its second header": (cut(PAGE + 100), "shorter than its headers"),
    "no page size": (lambda i: i.set(0, PAGE_SIZE_AT, 4095, "I"), "page size of 4095"),
    "two page sizes": (lambda i: i.set(1, PAGE_SIZE_AT, 8192, "I"), "different page sizes"),
    "a header that says it is another": (lambda i: i.set(1, 0, 7, "Q"), "not marked as one"),
    "a header that is marked as a leaf": (lambda i: i.set(0, 10, LEAF), "not marked as one"),
    "an unknown option": (lambda i: i.set(0, MAIN_FLAGS_AT, 4), "options that are never used"),
    "a list of free pages like any tree": (
        lambda i: i.set(1, FREE_FLAGS_AT, 0), "options that are never used",
    ),
    "headers out of turn": (
        lambda i: i.set_header(TRANSACTION_AT, i.header(TRANSACTION_AT) + 2), "are of commits",
    ),
    "headers of one commit": (
        lambda i: i.set_header(TRANSACTION_AT, i.get(1 - i.newest, TRANSACTION_AT, "Q")),
        "are of commits",
    ),
    "a list of free pages that ends too late": (
        lambda i: i.set(i.free, i.nodes(i.free)[-1] + 8, 99, "Q"), "ends with commit 99",
    ),
    "a list of free pages on a page of values": (
        lambda i: i.set_header(FREE_ROOT_AT, i.overflow), "free pages",
    ),
    "a list of free pages behind the end": (
        lambda i: i.set_header(FREE_ROOT_AT, 10**6), "behind the end",
    ),
    "a list of free pages that is none": (
        lambda i: i.set_header(FREE_ROOT_AT, 2**64 - 1), "ends with commit 0",
    ),
    "a list of free pages that is its own child": (
        own_child,
        "too deep",
    ),
    "a list of free pages with odd bounds": (
        lambda i: i.set(i.free, 12, i.get(i.free, 12) + 1), "wrong bounds",
    ),
    "a list of free pages with a node behind its end": (
        lambda i: i.set(i.free, i.get(i.free, 12) - 2, PAGE - 2), "wrong bounds",
    ),
    "a list of free pages of an unknown kind": (
        lambda i: i.set(i.free, 10, OVERFLOW), "no page of the list",
    ),
    "a page that says it is another": (lambda i: i.set(i.leaf, 0, 99, "Q"), "says it is page 99"),
    "a leaf in place of a branch": (
        lambda i: i.set(i.root, 10, LEAF), "wrong kind for its place",
    ),
    "a tree deeper than its header says": (
        lambda i: i.set_header(MAIN_DEPTH_AT, 1, "H"), "wrong kind for its place",
    ),
    "a page with odd bounds": (lambda i: i.set(i.leaf, 12, 17), "wrong bounds"),
    "a page that ends before it begins": (lambda i: i.set(i.leaf, 14, 8), "wrong bounds"),
    "a node at an odd place": (
        lambda i: i.set(i.leaf, 16, i.get(i.leaf, 16) + 1), "node outside its bounds",
    ),
    "a node behind the end": (lambda i: i.set(i.leaf, 16, PAGE - 4), "node outside its bounds"),
    "a node that is longer than its page": (in_leaf(0, lambda n: 60_000), "does not fit it"),
    "a key that is longer than keys are": (in_leaf(6, lambda n: 600), "does not fit it"),
    "a node of an unknown kind": (in_leaf(4, lambda n: 2), "unknown kind"),
    "a node without a key": (in_leaf(6, lambda n: 0), "unknown kind"),
    "a node that leaves a gap": (in_leaf(0, lambda n: n - 2), "overlap or leave gaps"),
    "keys out of order": (swap_keys, "out of order"),
    "children out of order": (swap_children, "out of order"),
    "a child that is there twice": (double_child, "used twice"),
    "a child behind the end": (
        lambda i: i.set(i.root, i.nodes(i.root)[1], 9999), "outside the file",
    ),
    "an older copy of the tree": (copy_root_of_old_header, "page"),
    "a large value behind the end": (
        lambda i: i.set(i.big[0], i.big[1] + 8 + i.get(i.big[0], i.big[1] + 6), 10**6, "Q"),
        "outside the file",
    ),
    "a large value that begins elsewhere": (
        lambda i: i.set(i.overflow, 0, 3, "Q"), "does not begin a value",
    ),
    "a large value with another number of pages": (
        lambda i: i.set(i.overflow, 12, 2), "does not begin a value",
    ),
    "a large value that is marked as a leaf": (
        lambda i: i.set(i.overflow, 10, LEAF), "does not begin a value",
    ),
    "a header that counts wrong": (
        lambda i: i.set_header(MAIN_LEAVES_AT + 0, 77), "the header counts",
    ),
    "a free page behind the end": (in_list(1, lambda i: 10**6), "is outside the file"),
    "a free page listed twice": (
        in_list(1, lambda i: i.get(i.free, i.list_at + 16, "Q")), "listed as free twice",
    ),
    "a free page that is in use": (in_list(1, lambda i: i.root), "in use and listed as free"),
    "a list of free pages that is longer than its place": (
        in_list(0, lambda i: 9999), "are not a list",
    ),
    "a list of free pages that is cut short": (one_list(8, 4), "is cut short"),
    "a list of free pages without its commit": (one_list(6, 16), "has no commit"),
    "a last page that nobody knows": (
        lambda i: i.set_header(LAST_PAGE_AT, i.header(LAST_PAGE_AT) + 1), "neither in use nor free",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMS)
def test_what_is_wrong_with_a_page_is_found_and_said(
    sound: bytes, tmp_path: Path, name: str
) -> None:
    harm, says = HARMS[name]
    image = Image(bytearray(sound))
    harm(image)
    assert image.raw != sound
    path = tmp_path / "db" / "data.mdb"
    path.parent.mkdir()
    path.write_bytes(image.raw)
    faults = closed_file_faults(str(path))
    assert any(says in fault for fault in faults), faults
    # As `entidb verify` finds it: said, or refused as no database; never the end of the process.
    with contextlib.suppress(FormatError):
        assert LmdbStorage.closed_faults(path.parent) == faults
    assert path.read_bytes() == image.raw


def test_a_leaf_that_the_quick_look_takes_is_one_that_the_exact_look_takes(sound: bytes) -> None:
    image = Image(bytearray(sound))
    page = sound[image.leaf * PAGE : (image.leaf + 1) * PAGE]
    walk = _TreeWalk(None, None, None)  # type: ignore[arg-type]
    random = Random(1)
    nodes = image.nodes(image.leaf)
    places = [*range(12, 16 + 2 * len(nodes)), *(at + n for at in nodes for n in range(8))]
    taken = 0
    for _ in range(20_000):
        harmed = bytearray(page)
        for at in random.choices(places, k=random.randint(1, 2)):
            harmed[at] = random.choice((0, 1, 2, harmed[at] ^ 1, harmed[at] + 2 & 255))
        raw = bytes(harmed)
        lower, upper = HEADER.unpack_from(raw, 0)[3:]
        keys = ordinary_keys(raw, lower, upper)
        if keys:
            taken += 1
            found = walk._nodes(raw, image.leaf, lower, upper, branch=False)
            assert [key for key, *_ in found] == keys and not any(big for *_, big in found)
    assert 0 < taken < 10_000


def test_looking_at_a_store_that_is_open_is_refused_and_one_that_is_missing_has_no_faults(
    tmp_path: Path,
) -> None:
    assert LmdbStorage.closed_faults(tmp_path / "missing") == []
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        store.commit({b"a": b"1"})
        with pytest.raises(DatabaseLockedError):
            LmdbStorage.closed_faults(tmp_path / "db")
        assert read_all(store) == {b"a": b"1"}
    assert LmdbStorage.closed_faults(tmp_path / "db") == []


@pytest.mark.parametrize("name", ["keys out of order", "a header that counts wrong"])
def test_verify_of_an_open_store_stops_at_damaged_pages(
    sound: bytes, tmp_path: Path, name: str
) -> None:
    harm, says = HARMS[name]
    image = Image(bytearray(sound))
    harm(image)
    (tmp_path / "data.mdb").write_bytes(image.raw)
    with contextlib.closing(LmdbStorage.open(tmp_path, salvage=True)) as store:
        faults = list(store.verify())
    assert len(faults) == 1 and says in faults[0]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_range_that_leads_to_another_page_is_damage_and_not_an_answer(
    sound: bytes, tmp_path: Path, reverse: bool
) -> None:
    image = Image(bytearray(sound))
    keys = [keys_of(image, image.child(number)) for number in range(4)]
    # Behind the last key of the second page stands the third, and before its first the first.
    place, leads_to = (0, 3) if reverse else (2, 0)
    first, other = (image.nodes(image.root)[number] for number in (place, leads_to))
    for at in (0, 2):
        image.set(image.root, first + at, image.get(image.root, other + at))
    (tmp_path / "data.mdb").write_bytes(image.raw)
    start, stop = (b"\0", keys[1][0]) if reverse else (keys[1][-1] + b"\0", b"\xff")
    with (
        contextlib.closing(LmdbStorage.open(tmp_path, salvage=True)) as store,
        store.snapshot() as snapshot,
        pytest.raises(CorruptionError, match="run verify"),
    ):
        snapshot.scan_keys(start, stop, reverse=reverse)


def keys_of(image: Image, page: int) -> list[bytes]:
    """The keys of a leaf."""
    places = [(page * PAGE + at, image.get(page, at + 6)) for at in image.nodes(page)]
    return [bytes(image.raw[at + 8 : at + 8 + size]) for at, size in places]
