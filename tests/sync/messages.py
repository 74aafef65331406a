"""Small messages of a device without data: what tests of transports and of HTTP send and answer."""

from __future__ import annotations

from entidb.protocol import HandshakeRequest, Limits, PullRequest, PullResponse

ID = bytes(range(16))
LIMITS = Limits(
    transaction_bytes_max=2**24,
    message_bytes_max=2**26,
    push_operations_max=10,
    pull_operations_max=10,
    collections_max=10,
)
HANDSHAKE = HandshakeRequest(major=1, minor=0, db_id="d", device_id=ID, history=None, cursor=0)
PULL = PullRequest(db_id="d", device_id=ID, history=ID, cursor=3, limit=10, bytes_max=1000)
PAGE = PullResponse(collections=[], commits=[], cursor=3, has_more=False, head=3, floor=0, time=1)
