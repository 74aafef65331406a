"""Settings of the device's engine: what may be chosen, what is chosen by default, and why.

Everything is checked when it is made, so a wrong setting is found where it is written and not in
the third hour of a background run. Only values live here: no clock, no sockets; ``policies.py``
says what the names of policies mean.

    HttpConfig     how to talk: timeouts, sizes, compression        (``HttpTransport`` takes it)
    └── SyncConfig what to sync and how much of it at a time        (the engine takes it)
    RetryConfig    when to try again
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, Self, get_args

from entidb.db.overruled import OVERRULED_DAYS, OVERRULED_MAX
from entidb.errors import ConfigError, InvalidNameError
from entidb.sync.conflict import ConflictPolicy
from entidb.sync.policies import resolve_policy
from entidb.sync.room import PROVE_SAMPLE, STAGED_BYTES_MAX
from entidb.types import (
    SEQUENCE_MAX,
    check_bool,
    check_int,
    check_name,
    check_number,
    kind_name,
)

Compression = Literal["auto", "zstd", "gzip", "none"]
COMPRESSIONS: Final[tuple[str, ...]] = get_args(Compression)
Prove = Literal["sample", "all"]
PROVES: Final[tuple[str, ...]] = get_args(Prove)

_MIB: Final = 1024 * 1024
#: Bounds that only keep a typo (seconds for milliseconds, bytes for MiB) from going unnoticed.
_SECONDS_MAX: Final = 7 * 24 * 3600.0
_OPERATIONS_MAX: Final = 1_000_000
_BYTES_MAX: Final = 1024 * _MIB
_VALUES_MAX: Final = 10_000_000
_DAYS_MAX: Final = 36_500.0
_ATTEMPTS_MAX: Final = 1000
_ROUNDS_MAX: Final = 1000
_STAGED_BYTES_LIMIT: Final = 1 << 50
_MULTIPLIER_MAX: Final = 100.0


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """When to try again: exponential backoff with full jitter, capped (rules, "Limits").

    It holds no state, so nothing wears out: ``attempts_max`` bounds one call of ``sync()``, and
    the next call, or the next turn of a background run, starts at attempt 1 again. What is worth
    trying again is decided by ``SyncError.retryable``, never here. Raises ``ConfigError``.
    """

    #: Attempts of one cycle, the first included; 1 never tries again. With the other defaults five
    #: attempts give up after at most 7.5 s, about as long as a person who pressed a button waits.
    attempts_max: int = 5
    #: Seconds. The longest wait before the second attempt.
    delay_initial_s: float = 0.5
    #: Seconds. The longest wait before any attempt. A minute keeps a background device close behind
    #: a server that comes back, and costs a dead server one request per minute and device.
    delay_max_s: float = 60.0
    #: Factor by which the longest wait grows each time. 1 keeps it as it is.
    multiplier: float = 2.0
    #: Draw every wait between 0 and its longest, so that a thousand devices that lost the server
    #: at once do not come back at once.
    jitter: bool = True
    #: Seconds. A longer ``Retry-After`` counts as this: a server may slow a device down, but not
    #: silence it for a year by one wrong number.
    retry_after_max_s: float = 3600.0

    def __post_init__(self) -> None:
        check_int("attempts_max", self.attempts_max, 1, _ATTEMPTS_MAX)
        check_number("delay_initial_s", self.delay_initial_s, 0.0, _SECONDS_MAX)
        check_number("delay_max_s", self.delay_max_s, 0.0, _SECONDS_MAX)
        check_number("multiplier", self.multiplier, 1.0, _MULTIPLIER_MAX)
        check_bool("jitter", self.jitter)
        check_number("retry_after_max_s", self.retry_after_max_s, 0.0, _SECONDS_MAX)
        if self.delay_max_s < self.delay_initial_s:
            raise ConfigError(
                f"delay_max_s ({self.delay_max_s}) is below delay_initial_s "
                f"({self.delay_initial_s}): raise the one or lower the other"
            )

    @classmethod
    def none(cls) -> Self:
        """Never try again: every error reaches the caller at once."""
        return cls(attempts_max=1)

    @classmethod
    def aggressive(cls) -> Self:
        """For a server nearby, or a person who watches: ten attempts, at most 5 s apart."""
        return cls(attempts_max=10, delay_initial_s=0.1, delay_max_s=5.0, multiplier=1.5)

    def delay_s(self, attempt: int, random: float, *, retry_after: float | None = None) -> float:
        """Seconds to wait after failed attempt number ``attempt`` (from 1, without an upper end).

        ``random`` is in 0 … 1 and drawn by the caller. The wait that the server asked for in
        ``retry_after`` comes first and the backoff is added to it, so the attempt is never earlier
        than the server said, and devices that all got the same time still spread.
        """
        longest = self._longest_delay_s(attempt)
        delay = longest * min(max(random, 0.0), 1.0) if self.jitter else longest
        if retry_after is None or not retry_after > 0.0:  # also what is not a number
            return delay
        return delay + min(retry_after, self.retry_after_max_s)

    def _longest_delay_s(self, attempt: int) -> float:
        try:
            grown: float = self.delay_initial_s * self.multiplier ** (max(attempt, 1) - 1)
        except OverflowError:
            return self.delay_max_s if self.delay_initial_s else 0.0
        # 0 * inf is no number, and min() would let it through.
        return min(grown, self.delay_max_s) if grown == grown else 0.0


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """How an ``HttpTransport`` talks to its server. Raises ``ConfigError``."""

    #: Seconds to a connection, TLS included. A longer time only delays the news that the device is
    #: offline.
    connect_timeout_s: float = 10.0
    #: Seconds that a server which has the request may be silent. Covers a busy server's disk.
    read_timeout_s: float = 30.0
    #: Seconds for one request and its whole answer: what stops a server that drips bytes. Enough
    #: for a full page of 4 MiB over 40 kB/s.
    total_timeout_s: float = 120.0
    #: Bytes of one answer, on the wire and unpacked. Above the largest transaction every server
    #: must accept (16 MiB) by a factor, below what hurts a small device.
    response_bytes_max: int = 64 * _MIB
    #: ``auto`` compresses nothing on loopback, where it only costs, else with zstd where both
    #: sides have it, else with gzip.
    compression: Compression = "auto"
    #: Smaller request bodies go as they are: below about 1 kB the packing costs more than it
    #: saves (measured, see the project's notes on dependencies).
    compression_min_bytes: int = 1024
    #: Send a token over plain ``http://`` to another machine. Everyone on the way can then read it
    #: and act as the device; only for networks that are encrypted below HTTP (a VPN).
    allow_insecure_token: bool = False

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "read_timeout_s", "total_timeout_s"):
            check_number(name, getattr(self, name), 0.001, _SECONDS_MAX)
        check_int("response_bytes_max", self.response_bytes_max, 1024, _BYTES_MAX)
        _check_choice("compression", self.compression, COMPRESSIONS)
        check_int("compression_min_bytes", self.compression_min_bytes, 0, _BYTES_MAX)
        check_bool("allow_insecure_token", self.allow_insecure_token)


@dataclass(frozen=True, kw_only=True)
class SyncConfig(HttpConfig):
    """What a device synchronises, and in which portions. Raises ``ConfigError``.

    ``db_id`` names the database on the server. The sizes are what this device asks for; the
    server's own limits, which come with the handshake, can only make them smaller.
    """

    db_id: str
    #: Name and version of the application, for the server's logs: ``"notes/2.1"``.
    client: str = ""
    #: Number of the schema this program works with, from 1, raised with every change that older
    #: programs should not see; 0: it names none, and no server answers that it is too old (R33).
    schema: int = 0
    #: What travels, both ways (R31). None: every collection that is not declared local.
    collections: tuple[str, ...] | None = None
    #: Operations and payload bytes of one push batch and of one pulled page. Measured: beyond a
    #: few thousand operations a commit gets no cheaper per operation, while a batch that is lost
    #: on a bad line costs more to send again.
    push_operations_max: int = 5000
    push_bytes_max: int = 4 * _MIB
    pull_operations_max: int = 5000
    pull_bytes_max: int = 4 * _MIB
    #: Bytes that one pull of several pages may bring before it is complete: a server whose pages
    #: never end must not fill the disk. The first sync of a large database has to fit. Beside it, a
    #: pull leaves a quarter of what was free on the disk.
    staged_bytes_max: int = STAGED_BYTES_MAX
    #: Begin with segments where a server has them, which is several times as fast as pages (R35).
    #: False: a first sync comes in pages, as from a server that has none.
    segments: bool = True
    #: Which values of a segment are proved to be canonical before they are used: a ``sample``, or
    #: ``all`` of them, as with pages. The hash of each segment is checked in any case.
    prove: Prove = PROVE_SAMPLE
    #: Pull, rebase and push again at most this often in one cycle (R7).
    rounds_max: int = 5
    #: Seconds between two cycles of a background run, when nothing asks for one earlier.
    interval_s: float = 30.0
    #: Let the server say when it has something new, while a background run goes on: one connection
    #: more. False: what others write comes with the next cycle.
    live: bool = True
    #: Take small changes together with the news of them, without asking for them. False: news name
    #: a commit, and bytes come only where this device has asked for them.
    live_pages: bool = True
    #: Policy of collections that ``policies`` does not name; see ``entidb.sync.policies``.
    default_policy: str | ConflictPolicy = "server_wins"
    #: Policy per collection: a name, a ``ConflictPolicy``, or a function of the conflict.
    policies: Mapping[str, str | ConflictPolicy] = field(default_factory=dict)
    #: How many values that a policy decided against are kept (R4), the newest ones; 0 keeps none.
    #: Ten thousand are some megabytes, and more than a person looks through.
    overruled_max: int = OVERRULED_MAX
    #: Days they are kept at most: as long as a server keeps its tombstones.
    overruled_days: float = OVERRULED_DAYS
    retry: RetryConfig = field(default_factory=RetryConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("db_id", self.db_id)
        _check_client(self.client)
        check_int("schema", self.schema, 0, SEQUENCE_MAX)
        self._check_collections()
        self._check_sizes()
        check_bool("live", self.live)
        check_bool("live_pages", self.live_pages)
        check_bool("segments", self.segments)
        _check_choice("prove", self.prove, PROVES)
        check_number("interval_s", self.interval_s, 0.0, _SECONDS_MAX)
        check_int("overruled_max", self.overruled_max, 0, _VALUES_MAX)
        check_int("staged_bytes_max", self.staged_bytes_max, 1, _STAGED_BYTES_LIMIT)
        check_number("overruled_days", self.overruled_days, 0.0, _DAYS_MAX)
        if not isinstance(self.retry, RetryConfig):
            raise ConfigError(f"retry must be a RetryConfig, not {kind_name(self.retry)}")
        self._check_policies()

    def _check_collections(self) -> None:
        given: object = self.collections
        if given is None:
            return
        if isinstance(given, str | bytes) or not isinstance(given, Iterable):
            raise ConfigError(
                f"collections must be a tuple of names or None, not {given!r}: "
                "write collections=('notes',)"
            )
        names = tuple(given)
        for name in names:
            _check_name("collections", name)
        if len(set(names)) != len(names):
            raise ConfigError(f"collections names one collection twice: {sorted(names)}")
        if not names:
            raise ConfigError("collections is empty: name one, or leave it None for all")
        object.__setattr__(self, "collections", names)  # also from a list

    def _check_sizes(self) -> None:
        for name in ("push_operations_max", "pull_operations_max"):
            check_int(name, getattr(self, name), 1, _OPERATIONS_MAX)
        for name in ("push_bytes_max", "pull_bytes_max"):
            check_int(name, getattr(self, name), 1, _BYTES_MAX)
        check_int("rounds_max", self.rounds_max, 1, _ROUNDS_MAX)

    def _check_policies(self) -> None:
        _check_policy("default_policy", self.default_policy)
        if not isinstance(self.policies, Mapping):
            raise ConfigError(f"policies must map collection names, not {kind_name(self.policies)}")
        for name, policy in self.policies.items():
            _check_name("policies", name)
            _check_policy(f"policies[{name!r}]", policy)
            if self.collections is not None and name not in self.collections:
                raise ConfigError(
                    f"policies names {name!r}, which collections leaves out: add it there, "
                    "or take the policy away"
                )
        # A copy to which only this object refers, and which cannot be written: frozen must mean
        # frozen.
        object.__setattr__(self, "policies", MappingProxyType(dict(self.policies)))


def _check_name(setting: str, name: object) -> None:
    try:
        check_name(name)  # type: ignore[arg-type]
    except InvalidNameError as error:
        raise ConfigError(f"{setting}: {error}") from error


def _check_client(client: object) -> None:
    if client != "":
        _check_name("client", client)


def _check_policy(setting: str, policy: str | ConflictPolicy) -> None:
    try:
        resolve_policy(policy)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
