"""What a simulated device synchronises, by the choice of its program and of its token."""

from __future__ import annotations

from collections.abc import Callable

from entidb.db import Database
from entidb.errors import ScopeError
from entidb.testing.person import Person
from entidb.testing.workload import COLLECTIONS, DRAFTS

#: The scopes that a device may get.
SCOPES = (None, COLLECTIONS[:2], COLLECTIONS[:3], COLLECTIONS[1:3])
#: What the token of a device may be for.
GRANTS = (None, None, COLLECTIONS[:1], COLLECTIONS[:2], COLLECTIONS[1:3], COLLECTIONS[2:], ())


class Scoped(Person):
    """The part of a device that is about collections."""

    database: Database
    #: The collections its tokens are for; None: all.
    granted: tuple[str, ...] | None

    def change_scope(self) -> None:
        chosen = self.another_scope()
        self._scoped(lambda: self.database.set_scope(chosen), "scope")

    def another_scope(self) -> tuple[str, ...] | None:
        """Mostly one that is not refused: nothing may leave the scope while it is pending."""
        now = self.database.scope
        others = [names for names in SCOPES if names is None or now != frozenset(names)]
        if self.watch.outbox and now is not None:
            others = [names for names in others if names is None or now <= frozenset(names)]
        return self.rng.choice(others)

    def change_local(self) -> None:
        local = self.rng.random() < 0.5
        self._scoped(lambda: self.database.declare_local(DRAFTS, local), "local_collection")

    def _scoped(self, change: Callable[[], None], fault: str) -> None:
        before = self.storage.commits
        try:
            self.guarded(change)
        except ScopeError as error:
            # A collection with pending changes cannot leave: the person tries again later.
            self.world.trace("scope refused", self.name, error.code)
            return
        if self.storage.commits != before:
            self.world.trace(fault, self.name)
            self.world.fired(fault)

    def change_grant(self) -> None:
        """This device gets a token for other collections."""
        self.granted = self.rng.choice([names for names in GRANTS if names != self.granted])
        self.renew_token()
        self.world.trace("grant", self.name, self.granted)
        self.world.tell(f"{self.name} gets a token for {self.granted or 'nothing'}")
        self.world.fired("grants")


__all__ = ["Scoped"]
