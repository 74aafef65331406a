"""Planted bugs: first syncs and resets that begin with segments (R35)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from msgspec.structs import replace

from entidb.db import machine, maintenance
from entidb.server.segments import building, keeping
from entidb.sync import pulling
from entidb.sync.apply import image, publish
from entidb.sync.apply.image import StagesImages
from entidb.sync.fetching import Fetching
from entidb.types import SEQUENCE_MAX
from tests.planted.garden import CALM, Garden, bug

#: Segments of two entities, a server that purges, and cycles that end in their middle.
FETCHING = CALM | {"images": 2, "lost": 100, "purge": 80, "upcast": 0, "old_program": 0}
#: The same with answers that are wrong and files that are damaged.
LYING = FETCHING | {"image_faults": 300}


@bug(
    "image-at-wrong-head",
    "PREFIX",
    "ORDER",
    "NO-RESURRECTION",
    "LIVENESS",
    # The server takes the cursor that it never gave for a proof that its files were put back.
    "NO-EFFECT",
    knobs=FETCHING,
)
def _wrong_head(garden: Garden) -> None:
    """A device believes that its image reaches one commit farther than it does."""

    def make(original: Any) -> Any:
        def begin_image(self: StagesImages, manifest: Any, full: Any, names: Any) -> Any:
            return original(self, replace(manifest, head=manifest.head + 1), full, names)

        return begin_image

    garden.replace(StagesImages, "begin_image", make)


@bug(
    "an-image-for-who-has-seen-another-past",
    "ORDER",
    "NO-LOST-UPDATE",
    "PREFIX",
    knobs=FETCHING | {"put_back": 200, "events": 1200},
)
def _image_of_another_past(garden: Garden) -> None:
    """A server gives an image to a device that has seen what the server does not have."""
    garden.replace(
        keeping,
        "pull_of",
        lambda original: lambda request, history: replace(original(request, history), seen=None),
    )


@bug(
    "segment-hash-not-checked",
    "PREFIX",
    "WHOLE",
    "NO-FALSE-CONFLICT",
    "UNEXPECTED",
    knobs=LYING,
)
def _hash_not_checked(garden: Garden) -> None:
    """Whatever came under the name of a segment is taken for it, if it can be read."""
    garden.replace(image, "_is_that", lambda original: lambda segment, data: True)


@bug("segment-skipped-at-resume", "PREFIX", "WHOLE", knobs=FETCHING)
def _skipped(garden: Garden) -> None:
    """A cycle that goes on with an image takes the segment that was under way for staged."""

    def make(original: Any) -> Any:
        def run(
            self: Fetching, state: Any, stage: Any, full: Any, names: Any
        ) -> Generator[Any, Any, bool]:
            if stage is not None and len(stage.image.left) > 1:
                rest = replace(stage.image, left=stage.image.left[1:], done=0)
                with self._exchange.applier.database.write() as writer:  # type: ignore[attr-defined]
                    before, stage = stage, replace(stage, image=rest)
                    writer.set_stage(machine.KEEP(before, stage))
            there: bool = yield from original(self, state, stage, full, names)
            return there

        return run

    garden.replace(Fetching, "run", make)


@bug("segment-begun-again", "PREFIX", "CONVERGE", "UNEXPECTED", knobs=FETCHING)
def _begun_again(garden: Garden) -> None:
    """A segment of which a part is staged is staged from its beginning, and counted twice."""

    def make(original: Any) -> Any:
        def run(
            self: Fetching, state: Any, stage: Any, full: Any, names: Any
        ) -> Generator[Any, Any, bool]:
            if stage is not None and stage.image.done:
                with self._exchange.applier.database.write() as writer:  # type: ignore[attr-defined]
                    before, stage = stage, replace(stage, image=replace(stage.image, done=0))
                    writer.set_stage(machine.KEEP(before, stage))
            there: bool = yield from original(self, state, stage, full, names)
            return there

        return run

    garden.replace(Fetching, "run", make)


@bug(
    "image-loses-pending",
    "NO-SILENT-LOSS",
    "READ-YOUR-WRITES",
    "RESET-KEEPS-OUTBOX",
    "CONVERGE",
    "UNEXPECTED",
    knobs=FETCHING,
)
def _loses_pending(garden: Garden) -> None:
    """What is pending is not put on top of what an image brought."""

    def make(original: Any) -> Any:
        def dirty_of(writer: Any, numbers: Any) -> Any:
            stage = writer.stage
            return [] if stage is not None and stage.image_head else original(writer, numbers)

        return dirty_of

    garden.replace(publish, "_dirty_of", make)


@bug(
    "image-of-another-history",
    "PREFIX",
    "WHOLE",
    "NO-RESURRECTION",
    "ORDER",
    "NO-EFFECT",
    knobs=LYING | {"restore_server": 50},
)
def _another_history(garden: Garden) -> None:
    """An image is taken that was made of another history of the database."""

    def make(original: Any) -> Any:
        def ask(self: Fetching, state: Any, names: Any) -> Generator[Any, Any, Any]:
            asked = original(self, state, names)
            response = None
            while True:
                try:
                    step = asked.send(response)
                except StopIteration as end:
                    return end.value
                response = yield step
                if getattr(response, "segments", None):
                    response = replace(response, history=state.history)

        return ask

    garden.replace(Fetching, "_ask", make)


@bug("image-below-the-floor", "NO-RESURRECTION", "PREFIX", "WHOLE", "UNEXPECTED", knobs=LYING)
def _below_the_floor(garden: Garden) -> None:
    """An image is completed although the server has forgotten deletions since."""
    garden.replace(pulling, "_moved", lambda original: lambda before, floor, image_head: False)


@bug("image-not-pinned", "PINNED", knobs=FETCHING)
def _not_pinned(garden: Garden) -> None:
    """A server forgets deletions that a device on its way with an image has still to hear of."""
    garden.replace(maintenance, "pinned_to", lambda original: lambda writer: SEQUENCE_MAX)


@bug("image-without-its-last-segment", "PREFIX", "CONVERGE", "WHOLE", knobs=FETCHING)
def _without_last(garden: Garden) -> None:
    """What a server has read last of a collection is not in its image."""

    def make(original: Any) -> Any:
        def cut(*given: Any) -> Any:
            return list(original(*given))[:-1]

        return cut

    garden.replace(building, "cut", make)


@bug("image-of-an-older-commit", "PREFIX", "CONVERGE", "NO-RESURRECTION", "ORDER", knobs=FETCHING)
def _older_commit(garden: Garden) -> None:
    """A server says that its image reaches as far as the database does now."""

    def make(original: Any) -> Any:
        def manifest_of(image: Any, wanted: Any, none: Any, *rest: Any) -> Any:
            found = original(image, wanted, none, *rest)
            return replace(found, head=none.head)

        return manifest_of

    garden.replace(keeping, "manifest_of", make)
