"""Bugs put into the real code on purpose, to show that the checkers can fail.

``python -m entidb.testing --planted``, from a checkout, plants each, alone, and says which
invariant noticed and after how many seeds. By subject:

    pulling     pulling and applying pages
    pushing     pushing, and settling what was answered
    refusals    pushes refused as a whole, and transactions that are rejected, withdrawn, held
    commits     what one commit of a device holds, and when it is acknowledged
    scopes      scopes and grants that change, adoption, the stage of a first sync or a reset
    clocks      the logical clock, on both sides
    waiting     what waits for a person: discarded, overruled, in conflict
    deciding    how the server decides about a push
    serving     the server's pages, its group commits, and what an error does to others
    running     how syncs are run, and the server's groups and stores
    keeping     who is locked out, what is frozen, and what devices make of it
    indexing    indexes that fall out of step, and what they answer
    unique      what is unique on a server, and is not
    quotas      how full a database of a server gets, and how many devices it has
    histories   histories, floors, tenants and backups of the server
    nodes       several nodes on one store, each with a memory of its own
    comparing   digests of devices and servers, and repairs
    fetching    first syncs and resets by segments
    people      a device that changes hands
    listening   news that are not told, not heard, or taken for more than they are
    ages        programs of different ages, and a server that stores newer shapes
"""

from importlib import import_module

from tests.planted.garden import BUGS, SEEDS_MAX, Bug, Finding, find, planted, try_all

#: The rooms register their bugs as they are imported: in the order in which ``--planted`` goes.
for _room in (
    "pulling",
    "pushing",
    "refusals",
    "commits",
    "scopes",
    "clocks",
    "waiting",
    "deciding",
    "serving",
    "running",
    "indexing",
    "unique",
    "quotas",
    "histories",
    "fetching",
    "ages",
    "keeping",
    "comparing",
    "people",
    "listening",
    "nodes",
):
    import_module(f"{__name__}.{_room}")

__all__ = ["BUGS", "SEEDS_MAX", "Bug", "Finding", "find", "planted", "try_all"]
