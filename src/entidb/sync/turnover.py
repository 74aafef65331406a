"""What happens to a device between two cycles, while none may run: it begins again with another
history, or another person takes it over.

The rules are ``apply``'s (``review``, ``signing``); here are the methods that programs call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from entidb.db import Database
from entidb.errors import (
    CommitUnknownError,
    ConfigError,
    EntiDBError,
    StorageError,
    SyncStateError,
)
from entidb.protocol import SUBJECT_CHARS_MAX
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.exporting import Exported
from entidb.sync.attempts import Attempts
from entidb.sync.interrupt import acting_thread
from entidb.sync.others import Others


class Turnover:
    """The part of an engine that changes whose device it is."""

    database: Database
    applier: DatabaseApplier
    stop: Callable[[], None]
    _attempts: Attempts
    _cycle_lock: threading.Lock
    _cycle_thread: int | None
    _others: Others

    def reset(self, keep: str) -> None:
        """After ``HistoryChangedError``: choose ``"server"`` or ``"device"`` (R29), then sync.
        Waits for a cycle in progress; inside one (a listener, a token provider) it raises
        ``SyncStateError``."""
        with self._between_cycles("reset"):
            self.applier.reset(keep)

    def logout(
        self,
        pending: str,
        *,
        file: str | os.PathLike[str] | None = None,
        subject: str | None = None,
    ) -> int:
        """The person whose token this engine has leaves the device (R36): it stops syncing in the
        background, and what they have committed and the server has not decided is

        * ``"keep"``: kept on the device, and pushed when somebody syncs with a token of the same
          subject, and under nobody else's;
        * ``"discard"``: taken out of the database, and gone;
        * ``"export"``: written to the new ``file``, a line of JSON for each transaction, durably,
          and then taken out.

        What others have built on what is taken out goes to ``discarded()``. Returns how many
        transactions were kept, discarded or exported. All else in the database stays as it is:
        ``Database.destroy`` removes it.

        A device that no server has told who that is can keep what is pending for ``subject``, who
        the next token of the same person will be for; else it raises ``SyncStateError``. Waits for
        a cycle in progress, as ``reset``. Raises ``ConfigError``, and ``StorageError`` where the
        file is there already or cannot be written; then nothing has changed."""
        check_logout(pending, file, subject)
        self._check_outside("logout")
        self.stop()
        with self._between_cycles("logout"):
            return sign_off(self.applier, pending, file, subject)

    def take_over(self, subject: str) -> int:
        """What waits for ``subject`` (``status().others``) is the present person's from now on, and
        pushed under their token; returns how many transactions that were, 0 if there were none.
        For work whose own person does not come back. Waits for a cycle, as ``reset``. Raises
        ``ConfigError`` for what is no subject."""
        check_subject(subject)
        with self._between_cycles("take_over"):
            return self.applier.hand_over(subject)

    def _check_outside(self, what: str) -> None:
        if self._cycle_thread == acting_thread():
            raise SyncStateError(f"{what}() inside a sync cycle: call it when the cycle is over")

    @contextmanager
    def _between_cycles(self, what: str) -> Iterator[None]:
        """No cycle runs inside the block, in no process; the next one shakes hands."""
        self._check_outside(what)
        with self._cycle_lock, self._others.kept_out():
            yield
            self._attempts.connection.forget()


def check_logout(pending: str, file: str | os.PathLike[str] | None, subject: str | None) -> None:
    """Raises ``ConfigError`` for what ``Turnover.logout`` does not take."""
    if pending not in ("keep", "discard", "export"):
        raise ConfigError(f"pending={pending!r}: choose 'keep', 'discard' or 'export'")
    if (file is not None) != (pending == "export"):
        raise ConfigError("export needs a file, a new one; keep and discard take none")
    if subject is None:
        return
    check_subject(subject)
    if pending != "keep":
        raise ConfigError(
            "a subject goes with keep: it says whom the next token of this person is for"
        )


def check_subject(subject: object) -> None:
    """Raises ``ConfigError`` for what no token can be for."""
    given: object = subject
    if not isinstance(given, str) or not 0 < len(given) <= SUBJECT_CHARS_MAX:
        raise ConfigError(
            f"a subject is text of up to {SUBJECT_CHARS_MAX} characters, not {subject!r:.60}"
        )
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the subject {given!r:.60} is not UTF-8: give one that is") from error


def sign_off(
    applier: DatabaseApplier,
    pending: str,
    file: str | os.PathLike[str] | None,
    subject: str | None,
) -> int:
    """What ``Turnover.logout`` does to the database. Raises as that does."""
    while applier.adopt():
        pass  # a reset that keeps the device's state has not made all of it pending yet
    if pending == "keep":
        return applier.sign_out(subject)
    if file is None:
        return applier.withdraw_own(None)
    exported = Exported(file)
    try:
        return applier.withdraw_own(exported)
    except StorageError as error:
        if not isinstance(error, CommitUnknownError):
            with suppress(EntiDBError), applier.database.view() as view:
                exported.take_back(view.snapshot)
        raise


__all__ = ["Turnover", "check_logout", "check_subject", "sign_off"]
