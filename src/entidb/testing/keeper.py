"""The administrator of a simulated run, who locks devices out and freezes databases, and lets them
in again (R32); and what has to hold as long as he does.

What he means is written down here, apart from the real ``Control`` that decides for the server.
"""

from __future__ import annotations

import random

from entidb.errors import SyncError
from entidb.protocol import PushRequest, PushResponse, SyncRequest, push_in
from entidb.server.control import Control, Frozen, Revoked
from entidb.server.group_commit import Done
from entidb.testing.world import World


class Keeper:
    """Of one server, whatever process it is at the moment."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self.control = Control(None, world.server_clock)
        self._locked: dict[bytes, str | None] = {}
        self._locked_at: dict[bytes, int] = {}
        self._frozen: set[str] = set()

    def turn_key(self, device_id: bytes, db_id: str) -> None:
        """Lock a device out, or let it in."""
        name = device_id.hex()
        if device_id in self._locked:
            self.control.allow("device", name, self._locked.pop(device_id))
            self._world.tell(f"device {name[:4]} is let in again")
            return
        place = db_id if self._rng.random() < 0.5 else None
        self._locked[device_id] = place
        self._locked_at[device_id] = self._world.now
        self.control.revoke(
            Revoked("device", name, self._world.server_clock.now_ms(), "keeper", place)
        )
        self._world.tell(f"device {name[:4]} is locked out")

    def freeze_or_thaw(self, db_id: str) -> None:
        """Let a database be read only, or written to again."""
        if db_id in self._frozen:
            self._frozen.discard(db_id)
            self.control.freeze(db_id, None)
        else:
            self._frozen.add(db_id)
            self.control.freeze(db_id, Frozen(self._world.server_clock.now_ms(), "keeper"))
        self._world.tell(f"{db_id} is {'frozen' if db_id in self._frozen else 'thawed'}")

    def open_all(self) -> None:
        for device_id, place in self._locked.items():
            self.control.allow("device", device_id.hex(), place)
        for db_id in self._frozen:
            self.control.freeze(db_id, None)
        self._locked.clear()
        self._frozen.clear()

    def is_frozen(self, db_id: str) -> bool:
        """Whether its pushes are left undecided."""
        return db_id in self._frozen

    def is_locked_out(self, request: SyncRequest) -> bool:
        """Whether this asker gets no answer."""
        return self.locks(request.device_id, request.db_id)

    def locks(self, device_id: bytes, db_id: str) -> bool:
        """Whether a device is locked out of a database."""
        return self._locked.get(device_id, "nowhere") in (None, db_id)

    def locked_ms(self, device_id: bytes, db_id: str) -> int:
        """For how long a device has been locked out of a database; 0: it is not."""
        if not self.locks(device_id, db_id):
            return 0
        return self._world.now - self._locked_at[device_id]

    def permitted(self, request: SyncRequest) -> None:
        """LOCKED: the front lets ``request`` pass."""
        checks = self._world.checks
        checks.that(
            not self.is_locked_out(request),
            "LOCKED",
            f"a {type(request).__name__} of a device that is locked out was let in",
        )
        checks.that(
            not (isinstance(request, PushRequest) and request.db_id in self._frozen),
            "LOCKED",
            f"{request.db_id} is frozen and takes a push",
        )

    def judging(self, request: SyncRequest, done: Done) -> Done:
        """``done``, after a look at what was decided, in the moment when it was."""

        def decided(answer: PushResponse | SyncError) -> None:
            pushed = push_in(request)
            took = isinstance(answer, PushResponse) and pushed is not None and pushed.transactions
            self._world.checks.that(
                not (took and request.db_id in self._frozen),
                "LOCKED",
                f"{request.db_id} is frozen, and a push to it was decided",
            )
            done(answer)

        return decided

    def refused(self, request: SyncRequest) -> bool:
        """Count a refusal of the front; whether it is the keeper's, and not for a token."""
        if self.is_locked_out(request):
            self._world.fired("revoke")
            return True
        if isinstance(request, PushRequest) and request.db_id in self._frozen:
            self._world.fired("freeze")
            return True
        return False


__all__ = ["Keeper"]
