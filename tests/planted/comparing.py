"""Planted bugs: digests of devices and servers, and repairs."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from entidb.db import digests
from entidb.db.records import decode_entity
from entidb.server import digesting
from entidb.sync.apply import repair
from entidb.sync.apply.rebase import Rebase
from entidb.sync.comparing import Comparing
from tests.planted.garden import Garden, bug


@bug("a-digest-of-what-is-pending", "DIGESTS")
def _digest_of_the_view(garden: Garden) -> None:
    """The digest of a device is over what its readers see, and not over the bases."""

    def make(original: Any) -> Any:
        def unlike(view: Any, info: Any, entity_id: bytes, raw: bytes) -> Any:
            row = decode_entity(raw)
            return entity_id, row.version, row.payload

        return unlike

    garden.replace(digests, "_unlike", make)


@bug("a-digest-without-a-collection", "DIGESTS")
def _collection_left_out(garden: Garden) -> None:
    """A device compares all of its collections but the first."""
    garden.replace(
        Comparing, "_names", lambda original: lambda self, names: original(self, names)[1:]
    )


@bug("a-digest-without-versions", "DIGESTS")
def _without_versions(garden: Garden) -> None:
    """A digest is over ids and values alone."""
    garden.replace(digests, "_HEAD", lambda original: lambda version, size: original(0, size))


@bug("a-digest-counts-the-deleted", "DIGESTS")
def _counts_the_deleted(garden: Garden) -> None:
    """The server's digests count what was deleted as if it were there, and empty."""

    def make(original: Any) -> Any:
        def settled(*arguments: Any) -> Any:
            for entity_id, version, payload in original(*arguments):
                yield entity_id, version, payload or b""

        return settled

    garden.replace(digesting, "settled", make)


@bug("a-digest-passes-over-its-last", "DIGESTS")
def _last_left_out(garden: Garden) -> None:
    """The device does not look for damage in the last block of a collection."""
    garden.replace(Comparing, "_unequal", lambda original: lambda *given: original(*given)[:-1])


@bug("a-repair-over-what-is-pending", "DIGESTS")
def _overwrites_pending(garden: Garden) -> None:
    """A repair puts the server's value in the place of a pending one."""

    def make(original: Any) -> Any:
        def repair_dirty(writer: Any, rebase: Rebase, ref: Any, remote: Any) -> None:
            row = writer.entity(ref)
            writer.set_base(ref, row, remote)
            writer.put_entity(ref, replace(row, pending=0, payload=remote.payload), row)

        return repair_dirty

    garden.replace(repair, "_repair_dirty", make)


@bug("a-repair-of-newer-ones-only", "DIGESTS")
def _newer_only(garden: Garden) -> None:
    """A repair leaves alone what has the version that the server has."""
    garden.replace(repair, "replace", lambda original: lambda row, **fields: row)


@bug("a-repair-that-withdraws-nothing", "DIGESTS")
def _pending_dropped(garden: Garden) -> None:
    """What is pending where a repair is needed leaves the outbox without a trace."""

    def make(original: Any) -> Any:
        def repair_dirty(writer: Any, rebase: Rebase, ref: Any, remote: Any) -> None:
            row = writer.entity(ref)
            chain = rebase._chain(ref, row)
            writer.set_base(ref, row, remote)
            rebase._drop_done(ref, chain, len(chain))

        return repair_dirty

    garden.replace(repair, "_repair_dirty", make)
