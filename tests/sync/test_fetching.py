"""A pull from nothing that begins with an image (R35), step by step: what it asks for and when,
what it does with each answer, and what it leaves behind where it gives up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db import Database
from entidb.db.replica import ImageSegment, Stage
from entidb.db.verifying import verify
from entidb.errors import (
    AuthenticationError,
    HistoryChangedError,
    PermissionDeniedError,
    ProtocolError,
    ResetRequiredError,
    ServerBusyError,
    ServerError,
    SyncCancelledError,
    SyncError,
    SyncTimeoutError,
    TlsError,
    TransportError,
    UpgradeRequiredError,
)
from entidb.protocol import Manifest, PullRequest, SnapshotRequest
from entidb.storage.directories import FETCHED
from entidb.sync import SyncConfig, SyncProgress, SyncState
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.seam import OpenSegment
from entidb.sync.exchange import Connection, Exchange, SendAhead, Step
from entidb.sync.fetching import AHEAD, FAILURES_MAX, FEATURE, Fetching, ProvedAhead
from entidb.sync.grants import GrantChangedError
from entidb.sync.segment_files import Fetch
from entidb.testing.images import ImageFiles, image_of
from entidb.types import SeenCommit
from tests.support import DB_ID, World

#: What a test puts in the place of an answer: it may raise, or do the usual thing itself.
Answer = Callable[[Step], Any]


class Device:
    """A device of the database that ``image`` is of, and one cycle of it after the other."""

    def __init__(self, image: ImageFiles, database: Database | None = None, **settings: Any):
        self.image = image
        self.database = database or Database.in_memory()
        self.applier = DatabaseApplier(self.database)
        self.applier.bind(DB_ID, image.manifest.history)
        self.config = SyncConfig(db_id=DB_ID, **settings)
        self.connection = Connection(
            history=image.manifest.history, features=[FEATURE], fetches=True
        )
        self.cancelled = False
        self.seen: list[SyncProgress] = []
        self.steps: list[Step] = []
        self.begin_cycle()

    def begin_cycle(self) -> None:
        self.exchange = Exchange(
            self.applier,
            self.config,
            self.connection,
            enter=lambda state: None,
            progress=self.seen.append,
            check=self._check,
        )

    def scope(self, names: list[str] | None) -> None:
        """Choose the collections, and do what a cycle does about that before it pulls."""
        self.database.set_scope(names)
        while self.applier.adopt():
            pass

    def _check(self) -> None:
        if self.cancelled:
            raise SyncCancelledError("cancelled")

    def run(
        self, answer: Answer | None = None, *, full: list[str] | None = None, scope: Any = None
    ) -> bool:
        """What ``Fetching.run`` returns or raises, where its steps get what ``answer`` says, as
        far as it says something, and otherwise what a good server and a good way bring."""
        look = self.applier.look()
        flow = Fetching(self.exchange, self._pull_from).run(look.state, look.stage, full, scope)
        self.steps = []
        try:
            step = next(flow)
            while True:
                self.steps.append(step)
                try:
                    said = self.usual(step) if answer is None else answer(step)
                except Exception as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(said)
        except StopIteration as end:
            done: bool = end.value
            return done

    def usual(self, step: Step) -> Manifest | None:
        if isinstance(step, SnapshotRequest):
            return self.image.manifest
        if isinstance(step, Fetch):
            self.bring(step)
        return None

    def bring(self, fetch: Fetch) -> None:
        first = fetch.segments[0]
        fetch.files.append(first, 0, self.image.files[first.sha256])

    def _pull_from(self, cursor: int) -> PullRequest:
        return PullRequest(
            db_id=DB_ID,
            device_id=self.applier.device_id,
            history=self.image.manifest.history,
            cursor=cursor,
            limit=1,
            bytes_max=1,
        )

    @property
    def stage(self) -> Stage | None:
        return self.applier.look().stage

    @property
    def parts(self) -> dict[bytes, bytes]:
        """The files of segments that lie beside the database."""
        return self.applier.segment_files().parts()

    def asked(self, kind: type) -> int:
        return sum(isinstance(step, kind) for step in self.steps)


def an_image(entities: int = 6, **options: Any) -> ImageFiles:
    """Of a server with so many entities of one collection; three in a segment."""
    world = World()
    for number in range(entities):
        world.put(("notes", number, "x" * (number + 1)))
    return image_of(world.server, **options)


def with_sizes(image: ImageFiles, *sizes: int) -> ImageFiles:
    """The image with a manifest that says other sizes."""
    named = image.manifest.segments
    assert len(sizes) == len(named)
    segments = [replace(each, bytes=size) for each, size in zip(named, sizes, strict=True)]
    return ImageFiles(replace(image.manifest, segments=segments), image.files)


def failing(kind: type, error: Exception) -> Answer:
    """Steps of this kind fail; there is nothing to say to any other."""

    def answer(step: Step) -> None:
        if isinstance(step, kind):
            raise error

    return answer


def half_way(device: Device) -> None:
    """The device has staged the first segment of its image, and its cycle has ended."""

    def answer(step: Step) -> Any:
        if isinstance(step, Fetch) and device.seen:
            raise TransportError("the line is cut")
        return device.usual(step)

    with pytest.raises(TransportError):
        device.run(answer)
    stage = device.stage
    assert stage is not None and stage.image is not None
    assert len(stage.image.left) == len(device.image.manifest.segments) - 1
    device.seen.clear()
    device.begin_cycle()


# ---------------------------------------------------------------- whether it asks


def test_an_image_is_staged_whole_and_what_follows_is_asked_for() -> None:
    device = Device(an_image(time_ms=12_345))
    assert device.run() is True
    manifest = device.image.manifest
    stage = device.stage
    assert stage is not None and stage.image is None
    assert (stage.full_cursor, stage.operations) == (manifest.head, manifest.entities)
    kinds = [type(step) for step in device.steps]
    assert kinds == [SnapshotRequest, Fetch, Fetch, SendAhead]
    ahead = device.steps[-1]
    assert isinstance(ahead, SendAhead) and isinstance(ahead.request, PullRequest)
    assert ahead.request.cursor == manifest.head
    assert device.parts == {}
    assert device.exchange.server_ms == 12_345
    assert verify(device.database) == []


@pytest.mark.parametrize("missing", ["setting", "way", "feature"])
def test_it_asks_for_nothing_where_one_side_or_the_way_knows_of_no_images(missing: str) -> None:
    device = Device(an_image(), segments=missing != "setting")
    device.connection.fetches = missing != "way"
    if missing == "feature":
        device.connection.features = ["columns"]
    assert device.run() is False
    assert device.steps == []


def test_an_image_has_one_try_in_a_cycle() -> None:
    device = Device(an_image())
    nothing = replace(device.image.manifest, segments=[])
    assert device.run(lambda step: nothing) is False
    assert device.run() is False
    assert device.steps == []
    device.begin_cycle()
    assert device.run() is True


def test_an_image_that_was_begun_is_gone_on_with_whoever_has_begun_it() -> None:
    """Another process may have, after this cycle has had its try."""
    device = Device(an_image())
    half_way(device)
    device.exchange.image_asked = True
    assert device.run() is True
    assert [type(step) for step in device.steps] == [Fetch, SendAhead]


def test_an_image_that_was_begun_is_given_up_where_nothing_can_be_fetched_any_more() -> None:
    device = Device(an_image())
    half_way(device)
    device.connection.fetches = False
    assert device.run() is False
    assert (device.stage, device.steps) == (None, [])
    assert verify(device.database) == []


def test_cancelling_between_the_manifest_and_the_image_begins_nothing() -> None:
    device = Device(an_image())

    def answer(step: Step) -> Manifest:
        device.cancelled = True
        return device.image.manifest

    with pytest.raises(SyncCancelledError):
        device.run(answer)
    assert device.stage is None


# ---------------------------------------------------------------- what can be used


@pytest.mark.parametrize("sizes", [(1024, 100), (100, 1024)])
def test_a_segment_may_have_as_many_bytes_as_an_answer(sizes: tuple[int, int]) -> None:
    device = Device(with_sizes(an_image(), *sizes), response_bytes_max=1024)
    with pytest.raises(TransportError):
        device.run(lambda step: _only_the_manifest(device, step))
    assert device.asked(Fetch) == 1


@pytest.mark.parametrize("sizes", [(1025, 100), (100, 1025)])
def test_a_larger_segment_is_not_asked_for(sizes: tuple[int, int]) -> None:
    device = Device(with_sizes(an_image(), *sizes), response_bytes_max=1024)
    assert device.run(lambda step: _only_the_manifest(device, step)) is False
    assert device.asked(Fetch) == 0
    assert device.stage is None


def _only_the_manifest(device: Device, step: Step) -> Manifest:
    if isinstance(step, SnapshotRequest):
        return device.image.manifest
    raise TransportError("the line is cut")


@pytest.mark.parametrize(
    ("names", "used"),
    [(None, True), (["notes"], True), (["carts", "notes"], True), (["carts"], False)],
)
def test_an_image_is_of_what_was_asked_for_or_of_less(names: list[str] | None, used: bool) -> None:
    device = Device(an_image())
    device.scope(names)
    assert device.run(scope=names) is used
    request = device.steps[0]
    assert isinstance(request, SnapshotRequest) and request.collections == names
    assert (device.asked(Fetch) > 0) is used


@pytest.mark.parametrize("seen", [None, SeenCommit(3, b"thisterm")])
def test_r29_the_request_says_what_the_device_has_seen(seen: SeenCommit | None) -> None:
    device = Device(an_image())
    with device.database.write() as writer:
        writer.set_sync_state(replace(device.applier.look().state, seen=seen))
    with pytest.raises(TransportError):
        device.run(lambda step: _only_the_manifest(device, step))
    request = device.steps[0]
    assert isinstance(request, SnapshotRequest) and request.seen == seen


def test_a_manifest_of_another_history_is_not_taken() -> None:
    device = Device(an_image())
    other = replace(device.image.manifest, history=b"o" * 16)
    assert device.run(lambda step: other) is False
    assert device.stage is None


def test_a_manifest_that_was_made_under_another_grant_is_told_to_who_pulls() -> None:
    device = Device(an_image(granted=["notes"]))
    with pytest.raises(GrantChangedError) as caught:
        device.run()
    assert caught.value.granted == ["notes"]
    assert device.stage is None


def test_where_another_process_has_begun_an_image_giving_up_leaves_it_alone() -> None:
    device = Device(an_image())

    def answer(step: Step) -> Manifest:
        begun = device.applier.begin_image(device.image.manifest, None, None)
        assert begun.image is not None
        device.applier.segment_files().append(begun.image.left[0], 0, b"some")
        return replace(device.image.manifest, segments=[])

    assert device.run(answer) is False
    assert device.stage is not None
    assert list(device.parts.values()) == [b"some"]


# ---------------------------------------------------------------- an answer that is an error


@pytest.mark.parametrize(
    "error",
    [
        SyncCancelledError("cancelled"),
        AuthenticationError("the token has expired"),
        HistoryChangedError("another history"),
        UpgradeRequiredError("too old"),
        ServerBusyError("busy"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_would_meet_a_pull_as_well_ends_the_cycle(error: SyncError) -> None:
    device = Device(an_image())
    with pytest.raises(type(error)):
        device.run(failing(SnapshotRequest, error))


@pytest.mark.parametrize(
    "error",
    [
        TransportError("the line is cut"),
        SyncTimeoutError("504"),
        AuthenticationError("401 of a proxy that wants to know who asks for this"),
        ServerBusyError("503 of a proxy that knows nobody who answers this"),
        ServerBusyError("429", code="rate_limited"),
    ],
    ids=lambda error: error.code,
)
def test_what_meets_nothing_but_the_request_for_an_image_does_not_keep_a_device_from_beginning(
    error: SyncError,
) -> None:
    """The handshake has worked each time, and a pull was never tried."""
    device = Device(an_image())
    for _ in range(FAILURES_MAX):
        with pytest.raises(type(error)):
            device.run(failing(SnapshotRequest, error))
        device.begin_cycle()
    assert device.run(failing(SnapshotRequest, error)) is False
    assert device.steps == []


@pytest.mark.parametrize(
    "error",
    [
        SyncCancelledError("cancelled"),
        HistoryChangedError("another history"),
        UpgradeRequiredError("too old"),
    ],
    ids=lambda error: error.code,
)
def test_what_says_nothing_of_the_way_does_not_count_against_it(error: SyncError) -> None:
    device = Device(an_image())
    with pytest.raises(type(error)):
        device.run(failing(SnapshotRequest, error))
    assert device.connection.image_failures == 0


@pytest.mark.parametrize(
    "error",
    [
        PermissionDeniedError("not this request"),
        ServerError("broken"),
        ProtocolError("not found", code="not_found"),
        ResetRequiredError("below the floor"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_about_this_request_alone_leads_to_a_pull(error: SyncError) -> None:
    device = Device(an_image())
    assert device.run(failing(SnapshotRequest, error)) is False
    assert device.asked(SnapshotRequest) == 1
    assert device.connection.image_failures == 0


def test_a_way_that_fails_whenever_an_image_is_asked_for_is_asked_no_more() -> None:
    device = Device(an_image())
    for failures in range(1, FAILURES_MAX + 1):
        with pytest.raises(TransportError):
            device.run(failing(SnapshotRequest, TransportError("the line is cut")))
        assert device.connection.image_failures == failures
        device.begin_cycle()
    assert device.run() is False
    assert device.steps == []


def test_an_answer_shows_that_the_way_lets_the_request_through() -> None:
    device = Device(an_image())
    for _ in range(FAILURES_MAX - 1):
        with pytest.raises(TransportError):
            device.run(failing(SnapshotRequest, TransportError("the line is cut")))
        device.begin_cycle()
    assert device.run() is True
    assert device.connection.image_failures == 0


# ---------------------------------------------------------------- segment after segment


def test_it_counts_the_bytes_of_values_and_tells_how_far_it_is() -> None:
    image = an_image(7)
    device = Device(image)
    device.applier._chunk_rows = 2  # a segment of three takes two commits
    assert device.run() is True
    sizes = [2 + number for number in range(7)]  # a head and as many characters
    places = [2, 3, 5, 6, 7]
    assert [p.operations for p in device.seen] == places
    assert [p.bytes for p in device.seen] == [sum(sizes[:place]) for place in places]
    assert {(p.state, p.operations_total) for p in device.seen} == {(SyncState.PULLING, 7)}
    assert device.exchange.result.bytes_pulled == sum(sizes)


def test_rows_of_a_collection_that_is_local_here_are_not_counted() -> None:
    world = World()
    for number in range(5):
        world.put(("notes", number, "x" * (number + 1)))
        world.put(("own", number, "y" * 100))
    image = image_of(world.server)
    device = Device(image)
    device.database.declare_local("own")
    assert device.run() is True
    last = device.seen[-1]
    assert (last.operations, last.operations_total) == (5, 5)
    assert last.bytes == sum(2 + number for number in range(5))
    assert device.exchange.result.bytes_pulled == last.bytes
    assert device.stage is not None and device.stage.operations == 5


def test_a_cycle_counts_what_came_in_it() -> None:
    device = Device(an_image())
    half_way(device)
    assert device.run() is True
    assert device.exchange.result.bytes_pulled == 5 + 6 + 7
    assert [(p.operations, p.bytes) for p in device.seen] == [(6, 2 + 3 + 4 + 5 + 6 + 7)]


def test_only_some_segments_are_known_ahead() -> None:
    image = an_image(AHEAD + 2, rows=1)
    device = Device(image)
    assert device.run() is True
    named = [segment.sha256 for segment in image.manifest.segments]
    fetched = [
        [segment.sha256 for segment in step.segments]
        for step in device.steps
        if isinstance(step, Fetch)
    ]
    assert fetched == [named[at : at + AHEAD] for at in range(len(named))]


def test_what_lies_there_of_another_image_goes_and_a_segment_goes_when_it_is_staged() -> None:
    device = Device(an_image(9))
    other = ImageSegment(b"o" * 32, "notes", 4, 1, b"a" * 16, b"b" * 16)
    device.applier.segment_files().append(other, 0, b"left")
    named = [segment.sha256 for segment in device.image.manifest.segments]
    there: list[set[bytes]] = []

    def answer(step: Step) -> Any:
        if isinstance(step, Fetch):
            there.append(set(device.parts))
            for segment in step.segments:  # those ahead come, too
                if segment.sha256 not in device.parts:
                    step.files.append(segment, 0, device.image.files[segment.sha256])
            return None
        return device.usual(step)

    assert device.run(answer) is True
    assert there == [set(), set(named[1:]), set(named[2:])]
    assert device.parts == {}


def test_cancelling_while_a_segment_is_on_its_way_sends_and_stages_nothing_more() -> None:
    device = Device(an_image(3))

    def answer(step: Step) -> Any:
        if isinstance(step, Fetch):
            device.cancelled = True
        return device.usual(step)

    with pytest.raises(SyncCancelledError):
        device.run(answer)
    assert device.asked(SendAhead) == 0
    stage = device.stage
    assert stage is not None and stage.operations == 0


@pytest.mark.parametrize("commits", [1, 2, 3])
def test_cancelling_between_two_commits_ends_it_before_anything_else(
    commits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(an_image())
    device.applier._chunk_rows = 2
    staged: list[int] = []
    stage_segment = device.applier.stage_segment

    def staging(opened: Any) -> Stage:
        stage = stage_segment(opened)
        staged.append(stage.operations)
        device.cancelled = len(staged) == commits
        return stage

    monkeypatch.setattr(device.applier, "stage_segment", staging)
    with pytest.raises(SyncCancelledError):
        device.run()
    assert len(staged) == commits
    assert device.asked(Fetch) == (1 if commits < 3 else 2)
    device.cancelled = False
    device.begin_cycle()
    monkeypatch.undo()
    assert device.run() is True
    stage = device.stage
    assert stage is not None and stage.operations == 6


def test_cancelling_ends_it_though_the_way_says_so_itself() -> None:
    device = Device(an_image())
    with pytest.raises(SyncCancelledError):
        device.run(lambda step: _cancelled(device, step))
    assert device.stage is not None, "and it goes on there"


def _cancelled(device: Device, step: Step) -> Any:
    if isinstance(step, Fetch):
        raise SyncCancelledError("cancelled")
    return device.usual(step)


def test_a_last_segment_that_is_damaged_once_is_no_reason_to_ask_twice_for_what_follows() -> None:
    device = Device(an_image())
    damaged = [device.image.manifest.segments[-1].sha256]

    def answer(step: Step) -> Any:
        if isinstance(step, Fetch) and step.segments[0].sha256 in damaged:
            segment = step.segments[0]
            damaged.remove(segment.sha256)
            step.files.append(segment, 0, bytes(segment.size))
            return None
        return device.usual(step)

    assert device.run(answer) is True
    kinds = [type(step) for step in device.steps]
    assert kinds == [SnapshotRequest, Fetch, Fetch, SendAhead, Fetch]


def test_a_segment_that_is_damaged_twice_is_given_up_with_all_that_came() -> None:
    device = Device(an_image())
    half_way(device)

    def answer(step: Step) -> None:
        if isinstance(step, Fetch):
            segment = step.segments[0]
            step.files.append(segment, 0, bytes(segment.size))

    assert device.run(answer) is False
    assert device.asked(Fetch) == 2
    assert_given_up(device)


def assert_given_up(device: Device) -> None:
    """Nothing is staged, and no file is kept."""
    assert device.stage is None
    assert device.parts == {}
    assert verify(device.database) == []


def test_giving_up_the_image_of_a_wider_scope_brings_nothing_again_that_is_there() -> None:
    world = World()
    for number in range(6):
        world.put(("notes", number, "a note"), ("carts", number, "a cart"))
    narrow = world.device()
    narrow.db.set_scope(["notes"])
    narrow.sync()
    device = Device(image_of(world.server, names=["carts"]), narrow.db)
    device.scope(["carts", "notes"])
    before = device.applier.look().state
    assert (before.full, before.uncovered) == (False, ["carts"])
    denied = PermissionDeniedError("not granted")
    given_up = device.run(
        lambda step: _or_fails(device, step, denied), full=["carts"], scope=["carts"]
    )
    assert given_up is False
    assert device.asked(Fetch) == 1
    assert_given_up(device)
    assert device.applier.look().state == before


# ---------------------------------------------------------------- a segment that does not come


@pytest.mark.parametrize(
    "error",
    [
        PermissionDeniedError("not granted"),
        ProtocolError("not found", code="not_found"),
        TlsError("another certificate"),
        OSError("the disk is full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_segment_that_will_not_come_is_given_up_at_once(error: Exception) -> None:
    device = Device(an_image())
    half_way(device)
    first = device.image.manifest.segments[1]

    def answer(step: Step) -> None:
        if isinstance(step, Fetch):
            step.files.append(step.segments[0], 0, b"some")
            assert first.sha256 in device.parts
            raise error

    assert device.run(answer) is False
    assert device.asked(Fetch) == 1
    assert_given_up(device)


def test_a_denial_that_may_pass_is_a_denial() -> None:
    """A token that was exchanged under way: the pull meets that again, and the next handshake says
    whose it is."""
    device = Device(an_image())
    error = PermissionDeniedError("another person's", code="subject_changed")
    error.retryable = True
    assert device.run(lambda step: _or_fails(device, step, error)) is False
    assert_given_up(device)


def _or_fails(device: Device, step: Step, error: Exception) -> Any:
    if isinstance(step, Fetch):
        raise error
    return device.usual(step)


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("the token has expired"),
        SyncTimeoutError("nothing came"),
        ServerBusyError("busy"),
        ServerError("broken"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_segment_that_may_come_later_is_waited_for_some_times(error: SyncError) -> None:
    device = Device(an_image())
    for _ in range(FAILURES_MAX - 1):
        with pytest.raises(type(error)):
            device.run(lambda step: _or_fails(device, step, error))
        assert device.asked(Fetch) == 1
        device.begin_cycle()
    assert device.stage is not None
    assert device.run(lambda step: _or_fails(device, step, error)) is False
    assert_given_up(device)


def test_a_way_that_brings_something_each_time_is_not_left() -> None:
    device = Device(an_image(3))
    (segment,) = device.image.manifest.segments
    data = device.image.files[segment.sha256]

    def answer(step: Step) -> Any:
        if isinstance(step, Fetch):
            at = len(device.parts.get(segment.sha256, b""))
            step.files.append(step.segments[0], at, data[at : at + 1])
            raise TransportError("the line is cut")
        return device.usual(step)

    for came in range(1, FAILURES_MAX + 3):
        with pytest.raises(TransportError):
            device.run(answer)
        assert device.parts == {segment.sha256: data[:came]}
        device.begin_cycle()


def test_a_segment_that_came_ends_the_row_of_failures() -> None:
    device = Device(an_image(9))

    def silent_at(place: int) -> Answer:
        sha = device.image.manifest.segments[place].sha256

        def answer(step: Step) -> Any:
            if isinstance(step, Fetch) and step.segments[0].sha256 == sha:
                raise SyncTimeoutError("nothing came")
            return device.usual(step)

        return answer

    for place in (0, 1, 2):
        for _ in range(FAILURES_MAX - 1):
            with pytest.raises(SyncTimeoutError):
                device.run(silent_at(place))
            device.begin_cycle()
    assert device.run() is True


def test_no_file_or_directory_is_left_behind(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as database:
        device = Device(an_image(), database)
        folder = tmp_path / "db" / FETCHED
        there: list[bool] = []

        def answer(step: Step) -> Any:
            if isinstance(step, SendAhead):
                there.append(folder.is_dir())
            return device.usual(step)

        assert device.run(answer) is True
        assert there == [True]
        assert not folder.exists()


# ---------------------------------------------------------------- proved by another thread


def _segment(number: int, rows: int = 2) -> ImageSegment:
    return ImageSegment(bytes([number]) * 32, "notes", 10, rows, bytes(16), bytes(16))


def _opened(segment: ImageSegment) -> OpenSegment:
    return OpenSegment(segment, [], [], 0)


def test_who_needs_a_segment_that_is_being_proved_waits_for_it() -> None:
    begun, ends = threading.Event(), threading.Event()

    def slowly(segment: ImageSegment) -> OpenSegment:
        begun.set()
        assert ends.wait(30)
        return _opened(segment)

    ahead = ProvedAhead(slowly)
    with ThreadPoolExecutor(3) as threads:
        opening = threads.submit(ahead.open, _segment(1))
        assert begun.wait(30)
        taking = threads.submit(ahead.take, _segment(1))
        assert ahead.take(_segment(2)) is None, "nobody has begun with that one"
        ends.set()
        taken = taking.result(30)
        opening.result(30)
    assert taken is not None and taken.segment == _segment(1)


def test_a_segment_is_proved_once_and_not_when_its_turn_has_come() -> None:
    proved: list[ImageSegment] = []

    def note(segment: ImageSegment) -> OpenSegment:
        proved.append(segment)
        return _opened(segment)

    ahead = ProvedAhead(note)
    for number in (1, 1, 2):
        ahead.open(_segment(number))
    ahead.open(_segment(3, rows=1))  # which may be too large to be there beside another
    assert [each.sha256[0] for each in proved] == [1, 2]
    for number in (1, 2):
        assert ahead.take(_segment(number)) is not None
        ahead.open(_segment(number))
        assert ahead.take(_segment(number)) is None
    assert ahead.take(_segment(3)) is None
    assert len(proved) == 2


def test_a_segment_of_the_same_name_that_is_to_hold_something_else_is_none() -> None:
    ahead = ProvedAhead(_opened)
    ahead.open(_segment(1, rows=2))
    assert ahead.take(_segment(1, rows=3)) is None


@pytest.mark.parametrize("error", [ProtocolError("bad"), OSError(5, "disk"), MemoryError()])
def test_what_is_wrong_with_a_segment_is_left_to_who_needs_it(error: Exception) -> None:
    def fails(segment: ImageSegment) -> OpenSegment:
        raise error

    ahead = ProvedAhead(fails)
    ahead.open(_segment(1))
    assert ahead.take(_segment(1)) is None


def test_a_fault_of_ours_is_raised_where_the_segment_is_needed() -> None:
    def fails(segment: ImageSegment) -> OpenSegment:
        raise ZeroDivisionError

    ahead = ProvedAhead(fails)
    ahead.open(_segment(1))
    with pytest.raises(ZeroDivisionError):
        ahead.take(_segment(1))
