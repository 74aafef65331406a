"""Images of databases (R35): when one is made, how long it is kept, and what of it counts.

    look      a chore of the housekeeper: what is due goes to a thread of its own
    make      one image from one snapshot, beside the work of others (``building``)
    manifest  the newest image that fits, pinned: the floor does not pass it (``db.images``)
    open      a segment of an image that counts
    drop      none counts any more, and the files go (``removing``)

An image counts while the record in its database names it. It is made when the database is large
enough, and anew when a tenth of it has changed and somebody has asked for the last one. Two are
kept at most, so that one that devices are on their way with stays while the next is made; one that
nobody asks for goes after a week. A device that cannot unpack what this server packs best has one
made that it can unpack, which is kept beside the other by the same rules. Several processes may do
all this for one database: one of them makes images, and each serves those of all. So do the nodes
of a server on PostgreSQL, which need a directory in common for it; one that has another leaves the
images alone (``building``).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from msgspec.structs import replace

from entidb import packing
from entidb.db import Database
from entidb.db.identity import history_in
from entidb.db.images import ImageRow, ImageRows, read_images
from entidb.db.maintenance import read_floor
from entidb.db.terms import term_at
from entidb.db.writer import Writer
from entidb.errors import (
    DatabaseClosedError,
    EntiDBError,
    HistoryChangedError,
    ProtocolError,
    StorageError,
    StorageFullError,
)
from entidb.events import SafeEvent, Thread
from entidb.protocol import Manifest, SegmentInfo, SnapshotRequest
from entidb.server.config import ServerConfig
from entidb.server.cores import run_anywhere
from entidb.server.hooks import Grant
from entidb.server.pages import wanted_collections
from entidb.server.records import Records
from entidb.server.segments.building import (
    Pauses,
    StoppedError,
    alive_images,
    build,
    counts,
    is_due,
    is_elsewhere,
    kept_rows,
    may_have_one,
)
from entidb.server.segments.cutting import SIZES
from entidb.server.segments.files import (
    FolderFiles,
    KeptFiles,
    KeptImage,
    MemoryFiles,
    SegmentFile,
)
from entidb.server.segments.manifests import manifest_of, no_manifest, pull_of, readable
from entidb.server.segments.places import ImagePlaces
from entidb.server.segments.removing import RIGHT, ImageRemoval
from entidb.server.segments.rows import change_images
from entidb.server.stores import Store, Stores
from entidb.types import Clock, Entropy

logger = logging.getLogger("entidb.server")

#: How long a manifest holds. The floor stays for twice as long, so that one commit an hour says so.
LIFE_MS: Final = 3_600_000
#: Seconds between two looks at a database, and until it is tried again where it did not work.
_LOOK_S: Final = 60.0
_AGAIN_S: Final = 600.0


def _go_on() -> None:
    return None


class ImageKeeper:
    """Thread-safe; ``close`` it. Starts a thread when the first image is due."""

    def __init__(
        self,
        config: ServerConfig,
        stores: Stores,
        clock: Clock,
        entropy: Entropy,
        files_of: Callable[[str], KeptFiles] | None = None,
        holds: Callable[[str], bool] | None = None,
        records: Records | None = None,
    ) -> None:
        """``files_of`` says where the files of a database are, if not where ``config`` has it;
        ``holds``, whether there is a database of that name; ``records`` are the server's."""
        #: The directory of the files, and the others that the server has or had.
        self.places: Final = ImagePlaces(config, records, clock, entropy)
        nowhere = config.address is not None and self.places.root is None
        self._least: Final = 0 if nowhere else config.segments_min_entities
        self._told: set[str] = set()
        self._spare = config.ready_disk_bytes_min
        self._stores, self._clock, self._entropy = stores, clock, entropy
        #: Whether a thread makes what is due; else somebody calls ``make``.
        self.background = True
        #: Whether handshakes name images of any database, as those of 0.6 do.
        self.offers_all = False
        #: How long a manifest holds.
        self.life_ms = LIFE_MS
        self._files_of = files_of
        #: How large segments are made.
        self.sizes = SIZES
        self._files: dict[str, KeptFiles] = {}
        #: Databases that are to be looked at by the thread, in order.
        self._due: dict[str, None] = {}
        #: What somebody has asked for that there was none of, for each database.
        self._wanted: dict[str, set[str]] = {}
        self._asked_at = float("-inf")
        #: When to look again, and where it did not work the last time.
        self._next: dict[str, float] = {}
        self._failed: set[str] = set()
        self._stop = SafeEvent()
        self._guard = threading.RLock()  # entered itself, as that of a ``Committer`` is
        self._news = threading.Condition(self._guard)
        self._thread: threading.Thread | None = None
        self._locks: dict[str, threading.Lock] = {}
        self._resting: Counter[str] = Counter()
        self.removal: Final = ImageRemoval(stores, self.places, self.files, self._lock_of, holds)

    @property
    def enabled(self) -> bool:
        return self._least > 0

    def offers(self, store: Store) -> bool:
        """Whether a handshake names images: where there can be none, nobody need ask."""
        with store.database.view() as view:
            return self.enabled and (self.offers_all or may_have_one(view, self._least))

    def close(self) -> None:
        """What is being made is given up. Idempotent."""
        self._stop.set()
        with self._guard:
            self._news.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def files(self, db_id: str) -> KeptFiles:
        if self._files_of is not None:
            return self._files_of(db_id)
        made = self._files.get(db_id)
        if made is None:
            folder = self.places.folder(db_id)
            new = MemoryFiles() if folder is None else FolderFiles(folder)
            made = self._files.setdefault(db_id, new)
        return made

    def is_true(self, view: Writer, row: ImageRow, image: KeptImage) -> bool:
        """Whether the image that ``row`` names is one of the database as ``view`` shows it."""
        return counts(view, row, image)

    # ------------------------------------------------------------ asked for

    def manifest(self, store: Store, request: SnapshotRequest, grant: Grant) -> Manifest:
        """The answer to ``request``; without segments where there is no image for it. Raises as
        a pull of everything does."""
        service, database = store.service, store.database
        image: KeptImage | None = None
        changed: HistoryChangedError | None = None
        now = self._clock.now_ms()  # it lasts from before the pin: a machine may freeze after that
        with database.view() as view:
            head, floor, history = view.head.sequence, read_floor(view), history_in(view)
            pull = pull_of(request, history)
            try:
                service.check_full(pull, grant, view)
            except HistoryChangedError as error:
                changed = error
            wanted = wanted_collections(view.catalogue, request.collections, grant.collections)
            if self.enabled and changed is None:
                image = readable(lambda: self.newest(view, request), request.db_id)
            term = None if image is None else term_at(view.snapshot, image.head)
        if changed is not None:
            raise service.proven(changed, pull, grant)
        if image is not None and not self._may_begin(database, image):
            image = None
        self.ask(store, request.packings, fits=image is not None)
        none = no_manifest(history, head, floor, now, grant)
        if image is None:
            return none
        return manifest_of(image, {info.name for info in wanted.values()}, none, self.life_ms, term)

    def _may_begin(self, database: Database, image: KeptImage) -> bool:
        try:
            return self.pin(database, image)
        except StorageFullError as error:
            # Without a pin there is no image, and pages need no room.
            logger.warning("an image is not pinned, and a device pulls instead: %s", error)
            return False

    def newest(self, view: Writer, request: SnapshotRequest) -> KeptImage | None:
        """The newest image that counts, of the best packing that the device can unpack."""
        files = self.files(request.db_id)
        alive = alive_images(view, files)
        for packed_with in sorted(alive, key=_rank):
            if packed_with in request.packings:
                return files.image(alive[packed_with][-1].id)
        return None

    def pin(self, database: Database, image: KeptImage) -> bool:
        """From now on the floor does not pass the image for ``life_ms``; whether it still counts.
        Mostly somebody has asked within the hour, and this stores nothing."""
        now, life_ms = self._clock.now_ms(), self.life_ms
        with database.view() as view:
            row = _row_of(read_images(view), image)
            if row is not None and life_ms <= row.until_ms - now <= 2 * life_ms:
                return True
        pinned = False

        def pin(writer: Writer, found: ImageRows) -> ImageRows | None:
            nonlocal pinned
            row = _row_of(found, image)
            if row is None or not counts(writer, row, image):
                return None
            pinned = True
            kept = replace(row, until_ms=writer.now_ms + 2 * life_ms)
            return replace(found, rows=[kept if each is row else each for each in found.rows])

        change_images(database, pin)
        return pinned

    def open(self, store: Store, sha256: bytes) -> tuple[str, SegmentInfo, SegmentFile] | None:
        """A segment of an image that counts, and the collection that it is of; None if there is
        none. The caller closes the file."""
        files = self.files(store.db_id)
        with store.database.view() as view:
            images = [
                image
                for row in read_images(view).rows
                if (image := files.image(row.id)) is not None and counts(view, row, image)
            ]
        for image in images:
            info = image.segment(sha256)
            file = None if info is None else files.open(sha256)
            if info is not None and file is not None:
                if file.size == info.bytes:
                    return image.collections[info.collection], info, file
                file.close()
                logger.error("segment %s of database %s is cut", sha256.hex(), store.db_id)
        return None

    # ------------------------------------------------------------ now and then

    def ask(self, store: Store, packings: Sequence[str], *, fits: bool) -> None:
        """Somebody has asked for an image who can unpack ``packings``, and ``fits`` says whether
        there is one for him. One is made if it is due, also where the last went because nobody had
        asked."""
        able = [each for each in packing.ENCODINGS if each in packings]
        if not self.enabled or self._stop.is_set() or not able:
            return
        if not fits:
            self._wanted.setdefault(store.db_id, set()).add(able[0])
            self._asked_at = self._clock.monotonic()
            with store.database.view() as view:
                unused = read_images(view).unused
            if unused:
                with contextlib.suppress(StorageFullError):  # then none could be made either
                    change_images(store.database, lambda _, found: replace(found, unused=False))
            if store.db_id not in self._failed:
                self._next.pop(store.db_id, None)
        self._look_at(store)

    def look(self) -> None:
        """Have done what is due for the databases that are open; clear up after those that are
        gone. Each housekeeping calls it."""
        if self._stop.is_set():
            return
        self.removal.look()
        if not self.enabled:
            return
        for db_id in self._stores.opened():
            with self._stores.looking(db_id) as store:
                try:
                    self._look_at(store)
                except EntiDBError as error:
                    logger.warning("database %s: its images are left alone: %s", db_id, error)
        self.removal.remove_strays()

    def _look_at(self, store: Store | None) -> None:
        """Hand the database to the thread, if there may be something to do."""
        db_id = "" if store is None else store.db_id
        waits = self._clock.monotonic() < self._next.get(db_id, 0.0)
        if store is None or waits or not self.background:
            return
        with store.database.view() as view:
            if not may_have_one(view, self._least):
                return
        with self._guard:
            self._due[db_id] = None
            if self._thread is None and not self._stop.is_set():
                thread = Thread(target=self._run, name="entidb-segments", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the next look tries again
                    logger.warning("there is no thread to make images: %s", error)
                    return
                self._thread = thread
            self._news.notify()

    def _run(self) -> None:
        run_anywhere()
        while True:
            with self._guard:
                while not self._due and not self._stop.is_set():
                    self._news.wait()
                if self._stop.is_set():
                    return
                db_id = next(iter(self._due))
                del self._due[db_id]
            self._do(db_id)

    def _do(self, db_id: str) -> None:
        pause_s = _LOOK_S
        try:
            self.make(db_id, Pauses(self._stop, self._clock.monotonic() - self._asked_at))
            self._failed.discard(db_id)
        except StoppedError:
            logger.info("database %s: an image was not made to its end", db_id)
        except (EntiDBError, OSError) as error:
            pause_s = _AGAIN_S
            self._failed.add(db_id)
            logger.warning("database %s: no image was made: %s", db_id, error)
        except Exception:
            # Without this thread no database would have images any more.
            pause_s = _AGAIN_S
            self._failed.add(db_id)
            logger.exception("database %s: making an image failed", db_id)
        self._next[db_id] = self._clock.monotonic() + pause_s

    def make(self, db_id: str, pause: Callable[[], None] = _go_on) -> bool:
        """Make an image of the database if one is due, and remove what does not count any more;
        whether one was made. Raises ``StoppedError``, ``OSError`` and errors of the storage; then
        there is what there was before."""
        with self._stores.looking(db_id) as store, self._lock_of(db_id):
            if store is None or not self.enabled or self._resting[db_id]:
                return False
            right = store.database.right(RIGHT)
            if not right.take(0):
                return False  # Another process is at it.
            try:
                self._clear_up(store)
                return self._make(store, partial(self._pause, db_id, pause))
            except (StorageError, DatabaseClosedError) as error:
                store.report(error)
                raise
            finally:
                right.give_back()

    @contextmanager
    def resting(self, db_id: str) -> Iterator[None]:
        """Inside the block this process makes no image of the database, and gives up the one that
        it is making: that has a snapshot open for as long as it takes."""
        with self._guard:
            self._resting[db_id] += 1
        try:
            with self._lock_of(db_id):
                pass  # the one that is being made has ended
            yield
        finally:
            with self._guard:
                self._resting[db_id] -= 1

    def _make(self, store: Store, pause: Callable[[], None]) -> bool:
        db_id, database, files = store.db_id, store.database, self.files(store.db_id)
        with database.view() as view:
            here = self.places.identity()
            if is_elsewhere(read_images(view), here, self._clock.now_ms()):
                return False
            wanted = {
                packing.ENCODINGS[0],
                *self._wanted.get(db_id, ()),
                *alive_images(view, files),
            }
            due = [
                each
                for each in packing.ENCODINGS
                if each in wanted and is_due(view, files, self._least, each, pause)
            ]
        for packed_with in due:
            self._make_one(store, packed_with, here, pause)
        if db_id in self._wanted:
            self._wanted[db_id] -= wanted
        return bool(due)

    def _pause(self, db_id: str, pause: Callable[[], None]) -> None:
        if self._resting[db_id]:
            raise StoppedError
        pause()

    def _make_one(
        self, store: Store, packed_with: str, here: bytes, pause: Callable[[], None]
    ) -> None:
        db_id, database, files = store.db_id, store.database, self.files(store.db_id)
        with database.view() as view:
            head = view.head.sequence
        if not self._has_room(database, files):
            raise StorageFullError(
                "there is not enough room for the files of an image beside the database"
            )

        def check() -> None:
            with self._stores.looking(db_id) as still, database.view() as view:
                if still is not store or read_images(view).dropped > head or self._stop.is_set():
                    raise StoppedError

        self.places.note(db_id)
        try:
            image = build(
                database,
                files,
                self._entropy(16),
                packed_with,
                check,
                pause,
                self.sizes,
                here,
            )
        except (StoppedError, ProtocolError, OSError):
            # After an error of the storage what is left goes with the next look.
            self._clear_up(store)
            raise
        logger.info(
            "database %s: an image of %d entities as of commit %d was made",
            db_id,
            image.entities,
            image.head,
        )

    def _has_room(self, database: Database, files: KeptFiles) -> bool:
        free = files.free_bytes()
        return free is None or free >= database.storage.info().used_bytes + self._spare

    def _clear_up(self, store: Store) -> None:
        files, here = self.files(store.db_id), self.places.identity()
        now = self._clock.now_ms()
        with store.database.view() as view:
            kept = kept_rows(view, files, now, here)
            changed = kept != read_images(view)
            elsewhere = is_elsewhere(kept, here, now)
        if changed:
            kept = change_images(
                store.database, lambda writer, _: kept_rows(writer, files, writer.now_ms, here)
            )
        if elsewhere and store.db_id not in self._told:
            self._told.add(store.db_id)
            logger.warning(
                "database %s: another node has its images in another directory, so they are of no "
                "use here: give all nodes the same segments_dir",
                store.db_id,
            )
        files.sweep([row.id for row in kept.rows])

    def drop(self, db_id: str) -> None:
        """See ``removing``."""
        self.removal.drop(db_id)

    def renamed(self, db_id: str, to: str) -> None:
        """Files of the database are found under its old name."""
        self.places.renamed(db_id, to)

    def left(self, db_id: str) -> list[str]:
        """The directories, as ``HOST:PATH``, in which what ``drop`` drops may still be."""
        return self.places.left(db_id)

    def _lock_of(self, db_id: str) -> threading.Lock:
        """Held in this process where an image is made or files are removed."""
        return self._locks.setdefault(db_id, threading.Lock())


def _rank(packed_with: str) -> int:
    """How good a packing is; 0 is the best."""
    known = packing.ENCODINGS
    return known.index(packed_with) if packed_with in known else len(known)


def _row_of(images: ImageRows, image: KeptImage) -> ImageRow | None:
    return next((row for row in images.rows if row.id == image.id), None)


__all__ = ["LIFE_MS", "ImageKeeper"]
