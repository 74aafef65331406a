"""The checkers of a device's side: each of its storage commits, compared with the oracle.

A ``DeviceWatch`` sees every batch that became durable, with what was there before, and knows which
commits returned to the application. Induction makes it cheap: what held before a commit is checked
again only where the commit, or a moving cursor, could have changed it.

    device     ``DeviceWatch``: every commit through all the checkers
    model      what the watch believes of its device
    commits    one storage commit, taken apart
    following  what a commit says of scope, grants and the cursor (R20, R29, R31)
    prefix     PREFIX and NO-RESURRECTION: a device's bases are the server's state at its cursor
    loss       NO-SILENT-LOSS, CLOCK: what leaves the outbox is on the server, listed, or decided
    owed       NO-SILENT-LOSS: what a wider scope or a reset has to make pending (R29, R31)
    decisions  NO-SILENT-LOSS: what was decided against in a commit is kept in it (R4)
    lists      SURFACED-ONCE: what waits for a person is listed, held, and reported once
    views      WHOLE and READ-YOUR-WRITES: what a program reads is what it wrote, all of it
    questions  NO-FALSE-CONFLICT: what a policy is asked about did happen
"""

from entidb.testing.watch.device import DeviceWatch
from entidb.testing.watch.model import Context

__all__ = ["Context", "DeviceWatch"]
