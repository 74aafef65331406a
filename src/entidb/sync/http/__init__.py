"""Sync messages over HTTP: addresses, tokens, compression, sizes, and every failure.

    transport      what goes into a request, and what its answer is for the engine
    answers        answers that report an error: in the protocol's words, or by their status
    failures       no answer at all: foreign exceptions as ours, in words for a person
    ahead          requests that leave before the engine asks for their answers
    client         the client that ships: connections, deadlines, ending what is under way
    steps          the steps of one exchange as the client library reports them
    news           news: a stream of events, or a request that waits
    streaming      the client for an answer that has no end
    watchdog       the thread that ends requests which take too long in all
    address        which URLs and which tokens a device may use
    subject        whether a token is another person's than the one before
    surroundings   proxies and certificate authorities of the environment

A server may be hostile, or not be one of ours at all (a hotel's login page, a proxy's error page):
an answer costs at most ``response_bytes_max`` bytes on the wire, the same again unpacked, and
``total_timeout_s``; no redirect is followed, so a token goes to the URL's host and to no other.
Only this package knows the client library. Retrying, and what an error means for the outbox, are
the subject of other rooms. The normative text is ``docs/protocol.md``, "HTTP".
"""

from entidb.sync.http.client import HttpxClient
from entidb.sync.http.transport import HttpTransport, Token
from entidb.sync.transport import HttpClient, HttpResponse

__all__ = ["HttpClient", "HttpResponse", "HttpTransport", "HttpxClient", "Token"]
