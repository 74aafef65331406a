"""Segments over HTTP: two at a time, each into a file that a later process goes on with. The next
one is asked for shortly before one ends, so that the line has something to carry meanwhile.

What is missing is asked for with a ``Range``. Our client hands an answer on as it comes; any other
brings it in pieces, so that a line that is cut costs one of them at most, and no more than one of
each segment is in memory. What a file holds in the end is for who asked: its hash is checked there.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

from entidb.db.replica import ImageSegment
from entidb.errors import ProtocolError, SyncCancelledError, TransportError
from entidb.events import SafeEvent, Thread
from entidb.sync.interrupt import Interrupts, act_for, acting_thread
from entidb.sync.segment_files import Fetch, SegmentFiles
from entidb.sync.transport import SINKS, HttpResponse, Sink

#: Bytes of one request at most: what a line that is cut costs, for each segment on its way; and
#: where less is lost, because they are kept as they come.
PIECE_BYTES: Final = 256 * 1024
STREAM_BYTES: Final = 4 * 1024 * 1024
#: What comes more slowly does not pile up before it is read, so larger parts may be asked for: each
#: time twice as much, up to ``STREAM_BYTES``.
SLOW_BYTES_PER_S: Final = 2e6
_WIDER_MAX: Final = 6
#: Segments that come at once: a client has to take two requests at a time.
AT_ONCE: Final = 2
#: One that has so few bytes to come counts no more among those, if the client is ours: what is
#: under way on a line when the next is asked for, of one with 40 Mbit/s and 50 ms.
NEAR_BYTES: Final = 256 * 1024
_JOIN_S: Final = 5.0
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")
_WHOLE: Final = 200

#: Asks for the path with these headers, as the transport asks for everything: with its token, and
#: a fresh one where it has expired. Any status is an answer; raises ``SyncError``.
Get = Callable[[str, dict[str, str], Sink | None], HttpResponse]
#: The error that an answer reports.
Explain = Callable[[str, HttpResponse], Exception]


@dataclass
class _Download:
    """One segment on its way."""

    db_id: str
    segment: ImageSegment
    files: SegmentFiles
    bytes_max: int
    done: threading.Event = field(default_factory=SafeEvent)
    error: BaseException | None = None
    #: Whether it ends so soon that the next one may begin.
    near: bool = False


class Downloads:
    """The segments that one transport fetches. ``fetch`` waits for one of them, as its thread does
    for everything; ``forget`` leaves those under way to themselves, and no piece of theirs is
    kept."""

    def __init__(
        self, get: Get, explain: Explain, interrupts: Interrupts, *, streams: bool = False
    ) -> None:
        self._get = get
        self._streams = streams
        self._explain = explain
        self._interrupts = interrupts
        self._lock = threading.Lock()
        self._under_way: dict[bytes, _Download] = {}
        #: How often the parts that are asked for were doubled.
        self._wider = 0
        #: Whether anything was ever fetched.
        self.begun = False
        self._threads: set[threading.Thread] = set()
        #: Opens one while the one before it is stored: always the same thread, because the system
        #: keeps what each has freed of so much memory.
        self._opener: ThreadPoolExecutor | None = None
        #: What was asked for last: a thread that is through goes on with what comes next there.
        self._newest: Fetch | None = None

    def fetch(self, fetch: Fetch) -> None:
        """See ``SyncTransport``."""
        self.begun = True
        first, files = fetch.segments[0], fetch.files
        self._newest = fetch
        if files.size(first) != first.size:
            self._begin(_Download(fetch.db_id, first, files, fetch.bytes_max))
        self._begin_following()
        with self._lock:
            wanted = self._under_way.get(first.sha256)
        if wanted is not None:  # else it is there
            try:
                self._interrupts.wait(wanted.done)
            finally:
                if wanted.done.is_set():
                    with self._lock:
                        self._under_way.pop(first.sha256, None)
            if wanted.error is not None:
                raise wanted.error
        self._open_second(fetch)

    def _open_second(self, fetch: Fetch) -> None:
        """If it is whole: who brings it does so else."""
        second = next(iter(fetch.segments[1:]), None)
        if fetch.opens is None or second is None or fetch.files.size(second) != second.size:
            return
        self._open(fetch.opens, second)

    def _open(self, opens: Callable[[ImageSegment], None], segment: ImageSegment) -> None:
        with self._lock:
            if self._opener is None:
                self._opener = ThreadPoolExecutor(1, "entidb-segment-opener")
            # Out of threads, or closed by now: then it is opened when its turn comes.
            with contextlib.suppress(RuntimeError):
                self._opener.submit(opens, segment)

    def _begin(self, download: _Download) -> None:
        """Bring what is waited for, whatever else comes."""
        with self._lock:
            before = self._under_way.get(download.segment.sha256)
            if before is not None and not (before.done.is_set() and before.error is None):
                return  # it comes, or why it does not is told to who waits for it
            self._start(download)

    def _begin_following(self) -> None:
        """Bring what comes next on threads of its own, as far as there is room for it."""
        with self._lock:
            # Those that were left to themselves count: a client takes so many requests at a time.
            threads_max = AT_ONCE + 1 if self._streams else AT_ONCE
            while len(self._threads) < threads_max and (following := self._following()):
                try:
                    self._start(following)
                except TransportError:
                    return  # the threads that there are go on with it

    def _start(self, download: _Download) -> None:
        thread = Thread(
            target=self._run,
            args=(download, acting_thread()),
            name="entidb-segment",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:  # out of threads, or the interpreter is ending
            raise TransportError(f"no thread could be started to fetch: {error}") from error
        self._under_way[download.segment.sha256] = download
        self._threads.add(thread)

    def forget(self) -> None:
        with self._lock:
            self._under_way.clear()
            self._newest = None

    def join(self) -> None:
        """Wait, but not for ever, until what was begun has seen that its client is closed."""
        with self._lock:
            threads, opener = list(self._threads), self._opener
        if opener is not None:
            opener.shutdown()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)

    # ------------------------------------------------------------ on a thread of its own

    def _run(self, begun: _Download, ident: int) -> None:
        act_for(ident)
        download: _Download | None = begun
        while download is not None:
            try:
                while self._is_wanted(download) and self._piece(download):
                    pass
            except BaseException as error:  # raised where it is waited for
                download.error = error
            with self._lock:
                download.done.set()
                opens = self._opens(download)
            if opens is not None:
                self._open(opens, download.segment)
            with self._lock:
                download = self._following() if download.error is None else None
                if download is None:
                    self._threads.discard(threading.current_thread())
                else:
                    self._under_way[download.segment.sha256] = download

    def _opens(self, download: _Download) -> Callable[[ImageSegment], None] | None:
        """What opens it, if its turn is next. With the lock held."""
        fetch = self._newest
        is_next = fetch is not None and fetch.segments[1:2] == [download.segment]
        return fetch.opens if fetch is not None and is_next and download.error is None else None

    def _following(self) -> _Download | None:
        """What is to come next, if it may begin now; nothing after an error, which is told first,
        or where all was forgotten. With the lock held."""
        fetch, under_way = self._newest, self._under_way
        if fetch is None or any(each.error is not None for each in under_way.values()):
            return None
        far = [each for each in under_way.values() if not (each.done.is_set() or each.near)]
        if len(far) >= AT_ONCE:
            return None
        # The first was waited for, and may be used up by now.
        for segment in fetch.segments[1:]:
            if segment.sha256 not in under_way and fetch.files.size(segment) != segment.size:
                if self._streams and far and segment is fetch.segments[-1]:
                    # Two that end together would have to be staged when nothing comes any more.
                    return None
                return _Download(fetch.db_id, segment, fetch.files, fetch.bytes_max)
        return None

    def _is_wanted(self, download: _Download) -> bool:
        with self._lock:
            return self._under_way.get(download.segment.sha256) is download

    def _piece(self, download: _Download) -> bool:
        """Fetch what comes next of it; whether there is more."""
        segment, files = download.segment, download.files
        at = files.size(segment)
        if at > segment.size:
            files.drop(segment)
            at = 0
        if at == segment.size:
            return False
        began, count = time.monotonic(), min(PIECE_BYTES, download.bytes_max)
        if self._streams:
            count = min(STREAM_BYTES, download.bytes_max << self._wider)
        last = min(at + count, segment.size) - 1
        path = f"/v1/segments/{segment.sha256.hex()}?db_id={quote(download.db_id, safe='')}"
        taking = _Taking(self, download, path, at, last)
        sink = taking if self._streams else None
        answer = self._get(path, {"Range": f"bytes={at}-{last}"}, sink)
        if answer.status not in SINKS:
            raise self._explain(path, answer)
        if sink is None:
            taking(answer, answer.body)
        if taking.came == 0:
            raise ProtocolError(f"{path} has fewer bytes than its manifest says")
        slow = taking.came < SLOW_BYTES_PER_S * (time.monotonic() - began)
        self._wider = min(self._wider + 1, _WIDER_MAX) if slow else 0
        return at + taking.came < segment.size

    def keep(self, download: _Download, at: int, data: bytes) -> None:
        """Put a part into the file. Raises ``SyncCancelledError`` if nobody wants it any more."""
        with self._lock:
            if self._under_way.get(download.segment.sha256) is not download:
                raise SyncCancelledError("this segment is not waited for any more")
            # Before anybody else may begin where this one ends.
            download.files.append(download.segment, at, data)
        if self._streams and not download.near:
            download.near = download.segment.size - at - len(data) <= NEAR_BYTES
            if download.near:
                self._begin_following()


class _Taking:
    """Takes one answer with the bytes from ``at`` to ``last``, as it comes."""

    def __init__(
        self, downloads: Downloads, download: _Download, path: str, at: int, last: int
    ) -> None:
        self.came = 0
        self._downloads = downloads
        self._download = download
        self._path = path
        self._at = at
        self._last = last
        #: Where in the segment the next part begins; unknown before the first.
        self._next: int | None = None

    def __call__(self, answer: HttpResponse, part: bytes) -> None:
        if self._next is None:
            self._next = self._begin_of(answer)
        begin, self._next = self._next, self._next + len(part)
        data = part[max(0, self._at - begin) : max(0, self._last + 1 - begin)]
        if data:
            self._downloads.keep(self._download, self._at + self.came, data)
            self.came += len(data)

    def _begin_of(self, answer: HttpResponse) -> int:
        if answer.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ProtocolError(f"{self._path} came packed, which was not asked for")
        if answer.status == _WHOLE:
            return 0  # a server, or something on the way, that knows no ranges
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", "").strip())
        if found is None or int(found[1]) != self._at:
            raise ProtocolError(f"{self._path} answered with another part than was asked for")
        return self._at


__all__ = ["AT_ONCE", "NEAR_BYTES", "PIECE_BYTES", "Downloads"]
