"""Hostile input: broken messages, bombs, forged tokens, lying servers, and canaries to find leaks.

Everything is drawn from the seed or the ``random.Random`` given in, so that a finding can be made
again. Nothing here judges: tests decide what a server or a client has to do about it, ours and
those of a person who writes another server or client from ``docs/protocol.md``.

    mutations       one message with each field removed, doubled, retyped, at its limits
    garbled         bytes with bits, heads and lengths changed
    dense, packed   bodies that are small on the wire and huge in memory
    forged_tokens   tokens that no server may believe
    hostile_server  a server that lies, for ``MockTransport``; ``LIES`` has one name for each lie
    GarblingServer  a ``LoopbackServer`` that breaks the answers of another one
    Canary          what must never be seen in an answer for another database
"""

from entidb.testing.fuzz.canaries import Canary, leaks
from entidb.testing.fuzz.lies import (
    LIES,
    GarblingServer,
    Honest,
    HostileServer,
    hostile_server,
    wired,
)
from entidb.testing.fuzz.messages import dense, garbled, mutations, packed
from entidb.testing.fuzz.tokens import forged_tokens

__all__ = [
    "LIES",
    "Canary",
    "GarblingServer",
    "Honest",
    "HostileServer",
    "dense",
    "forged_tokens",
    "garbled",
    "hostile_server",
    "leaks",
    "mutations",
    "packed",
    "wired",
]
