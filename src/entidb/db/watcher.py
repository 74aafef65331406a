"""Whoever is called with every change of a value (``entities``); and changes, in columns, as it is
told of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from entidb.db.catalogue import CollectionInfo

Payloads = Sequence[bytes | None]


class Watcher(Protocol):
    """Called with every change of a value: in the table that ``info`` names, which may be one that
    no reader sees yet, the values of ``ids`` were ``olds`` and are ``news`` (None: there is none).
    Called before or after the rows are written, within the same commit."""

    def watches(self, info: CollectionInfo) -> bool:
        """Whether what changes in the table that ``info`` names is of interest; who asks need not
        call for a table where it is not."""
        ...

    def changed(
        self, info: CollectionInfo, ids: Sequence[bytes], olds: Payloads, news: Payloads
    ) -> None: ...

    def finish(self) -> None:
        """The commit is about to be stored."""
        ...


def by_info(
    infos: Sequence[Any], *columns: Sequence[Any]
) -> Iterable[tuple[CollectionInfo, Sequence[Sequence[Any]]]]:
    """The rows of ``columns`` that are of each of ``infos``; mostly all are of one."""
    if infos and infos.count(infos[0]) == len(infos):
        return [(infos[0], columns)]
    places: dict[int, tuple[CollectionInfo, list[int]]] = {}
    for at, info in enumerate(infos):
        places.setdefault(info.number, (info, []))[1].append(at)
    return [
        (info, [[column[at] for at in chosen] for column in columns])
        for info, chosen in places.values()
    ]


__all__ = ["Payloads", "Watcher", "by_info"]
