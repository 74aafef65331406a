"""Terms: in which opening of its files a server's database made a commit (R29).

Files are put back only while no process has them open. So the first commit after an opening begins
a *term*, with a random name, and every commit belongs to the term that began last before it. A
device remembers the newest commit that it has seen, and its term. Where files were put back and
others have gone on from there, that number belongs to another term here: this is how the device
proves it, although the server's head is beyond what it has seen. A number and its term name a
commit and all before it.

Processes that have the files open at the same time need one term together. One that finds another
term than when it opened them knows that somebody else has begun it since, and begins none.

The files of PostgreSQL are opened by its server, and a database that is open in nodes may find
itself on an older state: another server leads that lacked the newest commits, or its own was
started with older files. The store says so by its mark, which goes on in another *opening* then
(``opening_of``); the record beside the term says in which opening that has begun.
"""

from __future__ import annotations

from typing import Final

from entidb.db.local import Role
from entidb.db.records import META_OPENING, TERM, end_of, sequence_key, sequence_of
from entidb.db.writer import Writer
from entidb.storage import Snapshot, Storage
from entidb.storage.base import opening_of
from entidb.types import TERM_BYTES, Entropy, Term


def newest_term(snapshot: Snapshot) -> Term | None:
    """None where none has begun: in a database of a program before 0.7, or a new one."""
    return _before(snapshot, end_of(TERM))


def term_at(snapshot: Snapshot, sequence: int) -> Term | None:
    """The term of commit ``sequence``; None if it is older than the first that is known."""
    return _before(snapshot, sequence_key(TERM, sequence) + b"\0")


def _before(snapshot: Snapshot, stop: bytes) -> Term | None:
    found = snapshot.scan(TERM, stop, limit=1, reverse=True)
    return Term(sequence_of(found[0][0]), found[0][1]) if found else None


#: So many openings may lie between the commit that a device has seen last and the present.
TERMS_KEPT: Final = 10_000
#: Of the record that says in which opening the newest term has begun.
OPENING_BYTES: Final = 8


class Terms:
    """Of one server's database that is open here."""

    def __init__(self, storage: Storage, entropy: Entropy) -> None:
        self._entropy = entropy
        #: The opening of the store in which a term has begun since this process opened it. None:
        #: it may still be for this process to begin that term.
        self.opening: int | None = None
        with storage.snapshot() as snapshot:
            self._found = newest_term(snapshot)

    def begin(self, writer: Writer) -> None:
        """Within the first commit that takes a sequence: begin a term, unless another process has
        since the files were opened. Until a later commit finds it there it is not taken for
        begun, whatever became of this one."""
        if writer.head.sequence < writer.first_sequence:
            return
        snapshot = writer.snapshot
        opening, noted = opening_of(snapshot.mark), snapshot.get(META_OPENING)
        begun_in = 0 if noted is None else int.from_bytes(noted, "big")
        if begun_in == opening and newest_term(snapshot) != self._found:
            self.opening = opening
            return
        writer.term = term = Term(writer.first_sequence, self._entropy(TERM_BYTES))
        writer.put(sequence_key(TERM, term.first), term.name)
        if begun_in != opening:
            writer.put(META_OPENING, opening.to_bytes(OPENING_BYTES, "big"))


def terms_of(storage: Storage, role: Role, read_only: bool, entropy: Entropy) -> Terms | None:
    """None where no terms begin: a device gives no versions, and a reader commits nothing."""
    return None if role is not Role.SERVER or read_only else Terms(storage, entropy)


def forget_terms(writer: Writer, limit: int) -> None:
    """Delete all but the newest ``TERMS_KEPT``, at most ``limit`` at once."""
    end = end_of(TERM)
    kept = writer.snapshot.scan_keys(TERM, end, limit=TERMS_KEPT, reverse=True)
    if len(kept) == TERMS_KEPT:
        writer.delete_many(writer.snapshot.scan_keys(TERM, kept[-1], limit=limit))


__all__ = [
    "Terms",
    "forget_terms",
    "newest_term",
    "term_at",
    "terms_of",
]
