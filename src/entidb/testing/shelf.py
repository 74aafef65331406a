"""The images of one database of a simulated server, in segments of a few entities (R35).

Some are those that the server itself makes and keeps. Others are made here: these get old, their
manifests end, files go, and some are not what they should be. A device that is told wrongly has to
end where it would have without.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from entidb import protocol
from entidb.db import Database
from entidb.errors import PermissionDeniedError, ProtocolError
from entidb.protocol import Manifest, SnapshotRequest
from entidb.server.hooks import Grant
from entidb.server.segments.building import StoppedError
from entidb.server.segments.files import MemoryFiles
from entidb.server.segments.keeping import ImageKeeper
from entidb.server.stores import Store
from entidb.sync.segment_files import SegmentFiles
from entidb.testing.images import ImageFiles, image_of
from entidb.testing.oracle import History
from entidb.testing.world import World

#: Virtual milliseconds that a manifest lasts: some are over before a slow device is through.
LIVES_MS: Final = (200, 2_000, 20_000)
#: How many images a database has at a time.
IMAGES_MAX: Final = 4
#: Virtual milliseconds that those of the server itself last.
SERVER_LIVES_MS: Final = (500, 5_000, 60_000)


class SimulatedShelf:
    """See the module."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._rng = world.stream(f"images of {name}")
        self._images: list[ImageFiles] = []
        #: Files of the server's own images, which outlive its processes.
        self.files = MemoryFiles()
        #: Of its own manifests: until when each holds, its commit, and of which history.
        self._told: list[tuple[int, int, History]] = []
        #: Up to which commit the floor may go until when.
        self._pinned: list[tuple[int, int]] = []

    @property
    def rows(self) -> int:
        return self._world.knobs.images

    def make(self, images: ImageKeeper) -> None:
        """The server makes an image, where one is due."""
        with contextlib.suppress(StoppedError):
            if images.make(self._name):
                self._world.trace("server makes an image", self._name)

    def check_floor(self, history: History) -> None:
        """The floor of the server has moved."""
        now, life_ms = self._world.server_clock.now_ms(), max(SERVER_LIVES_MS)
        # One that ends later was told by a clock that was put right since.
        self._told = [
            told for told in self._told if now < told[0] <= now + life_ms and told[2] is history
        ]
        for _, head, _ in self._told:
            self._world.checks.that(
                history.floor <= head,
                "PINNED",
                f"the floor of {self._name} went to {history.floor}, beyond an image as of {head}",
            )

    def answer(
        self,
        history: History,
        store: Store,
        request: SnapshotRequest,
        grant: Grant,
        told: Manifest,
    ) -> bytes:
        """What is answered where the server has said ``told``."""
        database, empty = store.database, told
        if told.segments:
            self._told.append((told.ends, told.head, history))
            if self._rng.random() < 0.5:
                self._world.fired("images")
                return protocol.encode(told)
            empty = replace(told, collections=[], segments=[], entities=0)
            empty = replace(empty, head=database.read_head().sequence)
        image = self._image(database, request, grant)
        if image is None:
            return protocol.encode(empty)
        world, rng = self._world, self._rng
        now = world.now
        manifest = image.manifest
        if manifest.history == empty.history:
            if manifest.head < empty.floor:
                # Too old for a device to begin with: a server answers with none, and some err.
                if not self._errs():
                    return protocol.encode(empty)
            manifest = replace(manifest, floor=min(empty.floor, manifest.head))
        ends = now + rng.choice(LIVES_MS)
        self._pinned.append((ends, manifest.head))
        world.trace("image", self._name, manifest.head, len(manifest.segments))
        return protocol.encode(replace(manifest, time=empty.time, ends=ends, granted=empty.granted))

    def _image(
        self, database: Database, request: SnapshotRequest, grant: Grant
    ) -> ImageFiles | None:
        wanted = request.collections
        granted = grant.collections
        if granted is not None:
            wanted = [name for name in sorted(granted) if wanted is None or name in wanted]
        fitting = [
            image
            for image in self._images
            if image.wanted == wanted
            and (image.manifest.history == database.history or self._errs())
        ]
        if fitting and self._rng.random() < 0.6:
            return self._rng.choice(fitting)
        made = image_of(database, names=wanted, rows=self.rows)
        if not made.manifest.segments:
            return None
        self._images = [*self._images[1 - IMAGES_MAX :], made]
        return made

    def _errs(self) -> bool:
        world = self._world
        errs = not world.quiet and self._rng.random() * 1000 < world.knobs.image_faults
        if errs:
            world.fired("image_faults")
        return errs

    def put_back(self, head: int) -> None:
        """The database ends at ``head`` again. An image counts while a record in its database names
        it, so one that was made later is none of the state that goes on from there."""
        self._images = [image for image in self._images if image.manifest.head <= head]

    def purge_limit(self, up_to: int) -> int:
        """How far the floor may go, as long as manifests last."""
        now = self._world.now
        self._pinned = [(ends, head) for ends, head in self._pinned if ends > now]
        return min([up_to, *(head for _, head in self._pinned)])

    def segment(
        self, images: ImageKeeper, store: Store, sha: bytes, part: range, grant: Grant
    ) -> bytes:
        """A part of a file. Raises ``SyncError``."""
        found = images.open(store, sha)
        if found is not None:
            collection, _, file = found
            _check_granted(collection, grant)
            return file.read(part.start, len(part))
        for image in self._images:
            data = image.files.get(sha)
            if data is None:
                continue
            collection = image.collection_of(sha)
            _check_granted(collection, grant)
            if self._errs():
                break
            self._world.fired("images")
            return self._changed(image, data)[part.start : part.stop]
        raise ProtocolError("there is no such segment", code="not_found")

    def _changed(self, image: ImageFiles, data: bytes) -> bytes:
        """The file, or what lies there in its place: another one, or one with a wrong value."""
        if not self._errs():
            return data
        if self._rng.random() < 0.5:
            return self._rng.choice(sorted(image.files.values()))
        # The last byte of a value: most of them stay canonical.
        return data[:-1] + bytes([data[-1] ^ 1])


def _check_granted(collection: str, grant: Grant) -> None:
    if grant.collections is not None and collection not in grant.collections:
        raise PermissionDeniedError("the token does not grant this collection")


def damage_files(
    files: SegmentFiles, rng: random.Random, fired: Callable[[str], None], rate: int
) -> None:
    """A process has ended: some of the files that it leaves are cut, longer, or changed."""
    for sha, part in sorted(files.parts().items()):
        if rng.random() * 1000 < rate:
            fired("image_faults")
            cut = part[: rng.randrange(len(part) + 1)]
            files.replace(sha, rng.choice((cut, part + part, b"x" + part[1:])))


__all__ = ["SimulatedShelf", "damage_files"]
