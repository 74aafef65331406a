"""The knobs of a simulated run: what can go wrong, and how often. Drawn per seed; data only.

Most knobs are zero in any one run, so that a run is about a few faults and has room for their
consequences (swarm testing); over a thousand seeds all of them meet all others.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from entidb.errors import ConfigError

#: Policies a run can give to a collection; the simulator's workload makes them.
POLICY_NAMES: Final = (
    "server_wins",
    "client_wins",
    "last_write_wins",
    "merge",
    "merge_counters",
    "merge_client",
    "merge_manual",
    "manual",
    "callable",
    "raises",
)
_DECADE_MS: Final = 315_576_000_000


@dataclass(frozen=True)
class Knobs:
    """One run. Probabilities are per thousand chances; sizes and times say their unit."""

    # -- the world
    events: int = 1200  # scheduled events of the safety phase
    devices: int = 3
    keys: int = 40  # entities per collection that devices fight over
    tenants: int = 1  # databases on the one server
    lmdb: int = 0  # 1: devices and server on LMDB in a temporary directory
    think_ms: int = 400  # mean time between two local transactions of a device
    pause_ms: int = 800  # mean time between two cycles of a device
    operations: int = 3  # most writes of one transaction, beside its group
    deletes: int = 150
    server_writes: int = 0  # transactions of programs on the server
    bulk: int = 0  # a transaction with many writes

    # -- settings of the real engine
    pull_operations_max: int = 5000
    pull_bytes_max: int = 4 << 20
    push_operations_max: int = 5000
    push_bytes_max: int = 4 << 20
    rounds_max: int = 5
    attempts: int = 1  # of one sync
    policy_notes: int = 0  # index into POLICY_NAMES
    policy_pairs: int = 0
    policy_carts: int = 3
    marks: int = 0  # 1: a local commit marks what it commits as in flight (R5)
    group_ms: int = 0  # the server gathers pushes this long for one commit
    singles: int = 0  # transactions of one write and no group: most batches are of such
    adopt_rows: int = 2_000  # entities that one commit of an adoption makes pending
    overruled_max: int = 10_000  # overruled values that a device keeps
    overruled_s: int = 1_000_000  # and seconds for which it does
    stale_rows: int = 0  # feed rows that may wait to be removed, on devices and on the server

    # -- network
    latency_ms: int = 20
    late: int = 0
    lost: int = 0
    repeated: int = 0
    reordered: int = 0
    cut: int = 0
    partition: int = 0  # of a device, both ways
    partition_one_way: int = 0
    expired_token: int = 0
    wrong_token: int = 0

    # -- devices
    crash_before: int = 0  # of storage commits
    crash_after: int = 0
    commit_unknown: int = 0
    disk_full: int = 0
    map_full: int = 0
    restore_device: int = 0
    copy_device: int = 0
    clock_offset_ms: int = 0  # each device is wrong by up to this much, either way
    clock_jump: int = 0
    cancel: int = 0
    ahead: int = 0  # pages are asked for while the one before is staged
    local_in_cycle: int = 0  # a commit between two steps of a cycle that has no request out
    scope: int = 0
    grants: int = 0  # tokens whose collections change
    people: int = 0  # looks at which a device changes hands, or gets another's token (R36)
    scope_in_cycle: int = 0  # between two steps of a cycle, such as after its pull
    local_collection: int = 0
    person: int = 0  # resolve, recommit, prune
    reader: int = 0  # snapshots held open over other events
    indexes: int = 0  # what is done with indexes, on devices and on the server

    # -- server
    server_crash_before: int = 0
    server_crash_after: int = 0
    server_commit_unknown: int = 0
    server_disk_full: int = 0
    restore_server: int = 0
    restore_twice: int = 0
    put_back: int = 0  # older files of the server, under the history they had
    purge: int = 0
    refuse: int = 0  # transactions that the validate hook refuses
    refuse_raises: int = 0  # transactions the validate hook raises at
    unique: int = 0  # how many values a field has of which the server takes each once
    quota_entities: int = 0  # entities that a database may hold; 0: any number
    quota_bytes: int = 0  # bytes that its store may take
    quota_devices: int = 0  # devices that it lets in, until the faults stop

    # -- several nodes (where ``lmdb`` is zero)
    nodes: int = 0  # processes that serve the same databases; 0 and 1: one
    node_pause: int = 0  # places inside a request, or beside one, at which a node is paused
    node_kill: int = 0  # looks at which a node is killed; and pauses that end with it
    standby_away: int = 0  # commits that find no standby
    news_late: int = 0  # looks of a node that do not find what others have committed

    # -- devices that run in the background
    live: int = 0  # devices that sync for news, commits and their interval, of a thousand
    hint_lost: int = 0  # of hints
    hint_late: int = 0
    hint_doubled: int = 0
    hint_foreign: int = 0  # hints with a number of another history beside them
    stream_cut: int = 0  # hints whose stream is cut
    stream_held: int = 0  # streams that something on the way gathers
    pages: int = 0  # 1: hints carry pages; more: so many operations less one, the first of several

    # -- pushes that are refused as a whole (R5)
    body_limit: int = 0  # looks at which a proxy's limit for bodies changes
    firewall: int = 0  # transactions that a firewall, which comes and goes, stops
    revoke: int = 0  # looks at which a device is locked out, or let in again (R32)
    freeze: int = 0  # looks at which a database takes no pushes, or takes them again
    read_only: int = 0  # looks at which a token loses the right to write, or gets it back
    rounds: int = 0  # 1: the server takes a pull and a push in one request
    older_server: int = 0  # 1: a server of 0.3, which refuses a push whole for one transaction
    invalid: int = 0  # transactions such a server finds invalid

    # -- programs of different ages (R33)
    old_program: int = 0  # 1: old programs, and a server that refuses their pulls for a while
    upcast: int = 0  # 1: a server that stores what old programs push in a newer shape

    # -- first syncs by segments (R35)
    images: int = 0  # entities of a segment; 0: the server has no images
    image_faults: int = 0  # answers about images that are wrong, and files that were damaged


#: Knobs whose events are counted; one that never fires in 1,000 seeds is an error.
FAULTS: Final = (
    "late",
    "lost",
    "repeated",
    "reordered",
    "cut",
    "partition",
    "partition_one_way",
    "expired_token",
    "wrong_token",
    "crash_before",
    "crash_after",
    "commit_unknown",
    "disk_full",
    "map_full",
    "restore_device",
    "copy_device",
    "clock_offset_ms",
    "clock_jump",
    "cancel",
    "ahead",
    "local_in_cycle",
    "scope",
    "scope_in_cycle",
    "grants",
    "people",
    "local_collection",
    "person",
    "reader",
    "indexes",
    "server_crash_before",
    "server_crash_after",
    "server_commit_unknown",
    "server_disk_full",
    "node_pause",
    "turn_lost",
    "node_kill",
    "standby_away",
    "store_restart",
    "failover",
    "news_late",
    "live",
    "hint_lost",
    "hint_late",
    "hint_doubled",
    "hint_foreign",
    "stream_cut",
    "stream_held",
    "pages",
    "restore_server",
    "restore_twice",
    "put_back",
    "body_limit",
    "firewall",
    "read_only",
    "revoke",
    "freeze",
    "older_server",
    "invalid",
    "old_program",
    "upcast",
    "purge",
    "refuse",
    "refuse_raises",
    "unique",
    "quota_entities",
    "quota_bytes",
    "quota_devices",
    "policy_raises",
    "group",
    "server_writes",
    "bulk",
    "lmdb",
    "images",
    "image_faults",
)

#: What a fault may be set to when a run has it: one is chosen.
LEVELS: Final[dict[str, tuple[int, ...]]] = {
    "late": (20, 100, 300),
    "lost": (20, 100, 300),
    "repeated": (20, 100, 300),
    "reordered": (50, 300),
    "cut": (20, 100),
    "partition": (5, 20, 80),
    "partition_one_way": (5, 20, 80),
    "expired_token": (20, 100),
    "wrong_token": (10, 50),
    "crash_before": (2, 20, 60),
    "crash_after": (2, 20, 60),
    "commit_unknown": (2, 20, 60),
    "disk_full": (5, 50),
    "map_full": (5, 50),
    "restore_device": (2, 8, 30),
    "copy_device": (2, 6, 30),
    "clock_offset_ms": (5_000, 3_600_000, _DECADE_MS),
    "clock_jump": (5, 20, 80),
    "cancel": (5, 50),
    "ahead": (500,),
    "local_in_cycle": (50, 300),
    "scope": (10, 40, 150),
    "scope_in_cycle": (20, 100),
    "local_collection": (5, 15, 60),
    "person": (30, 100),
    "reader": (20,),
    "server_crash_before": (5, 20, 60),
    "server_crash_after": (5, 20, 60),
    "server_commit_unknown": (5, 20, 60),
    "server_disk_full": (10, 50),
    "restore_server": (2, 10, 50),
    "restore_twice": (300, 1000),
    "purge": (5, 20, 80),
    "refuse": (20, 100),
    "refuse_raises": (20, 60),
    "server_writes": (20, 100),
    "bulk": (10, 40),
}

#: As ``LEVELS``, for knobs that came later: each is drawn from a stream of its own, so that the
#: seeds of before are still the runs they were wherever it is zero.
LATER_LEVELS: Final[dict[str, tuple[int, ...]]] = {
    "put_back": (5, 20, 80),
    "grants": (20, 80, 300),
    "body_limit": (200, 1000),
    "firewall": (50, 300),
    "read_only": (50, 300),
    "older_server": (1,),
    "invalid": (20, 60),
    "old_program": (1,),
    "upcast": (1,),
    "revoke": (30, 150, 400),
    "freeze": (30, 150),
    "indexes": (100, 500),
    "unique": (3, 12),
    "images": (1, 2, 5),
    "people": (20, 80, 300),
    "quota_entities": (4, 15, 60),
    "quota_bytes": (1_500, 6_000, 20_000),
    "quota_devices": (1, 2, 3),
}
#: As ``LATER_LEVELS``, for runs with several nodes.
NODE_LEVELS: Final[dict[str, tuple[int, ...]]] = {
    "node_pause": (5, 20, 80),
    "node_kill": (20, 100),
    "standby_away": (50, 200),
    "news_late": (100, 500),
}
#: As ``LATER_LEVELS``, for runs with devices that run in the background.
LIVE_LEVELS: Final[dict[str, tuple[int, ...]]] = {
    "hint_lost": (20, 200),
    "hint_late": (20, 200),
    "hint_doubled": (50, 300),
    "hint_foreign": (20, 200),
    "stream_cut": (20, 100),
    "stream_held": (50, 500),
}
#: How many runs in a hundred have one of those.
LATER_PERCENT: Final = 15

#: Length of a run, and how many runs in a hundred have it. Most bugs need a few dozen events with
#: the right faults, so that many short runs, each with other knobs, find more than few long ones;
#: the long ones are for what has to build up first.
EVENTS: Final[dict[int, int]] = {60: 30, 120: 34, 250: 22, 600: 11, 2000: 3}


def stream(seed: int, name: str) -> random.Random:
    """One independent source of randomness per purpose, so that asking one of them once more
    changes nothing in the others. Seeded by text through SHA-256, never through ``hash()``."""
    digest = hashlib.sha256(f"entidb simulator {seed} {name}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def draw(seed: int) -> Knobs:
    """The knobs of run ``seed``."""
    rng = stream(seed, "knobs")
    some = rng.choice((0.1, 0.25, 0.5))
    chosen: dict[str, int] = {
        name: rng.choice(levels) if rng.random() < some else 0 for name, levels in LEVELS.items()
    }
    # Something for the person to do, wherever a policy can leave work to them.
    chosen["person"] = chosen["person"] or rng.choice((0, 30))
    chosen.update(
        events=rng.choices(list(EVENTS), list(EVENTS.values()))[0],
        devices=rng.choice((2, 2, 2, 3, 3, 4, 6, 8)),
        keys=rng.choice((2, 5, 5, 20, 80, 400)),
        tenants=rng.choice((1, 1, 2)),
        lmdb=int(rng.random() < 0.012),
        think_ms=rng.choice((100, 400, 1500)),
        pause_ms=rng.choice((100, 800, 3000)),
        operations=rng.choice((0, 1, 3, 8)),
        deletes=rng.choice((0, 100, 400)),
        pull_operations_max=rng.choice((1, 2, 7, 40, 5000)),
        pull_bytes_max=rng.choice((1, 300, 4 << 20)),
        push_operations_max=rng.choice((1, 5, 40, 5000)),
        push_bytes_max=rng.choice((1, 1000, 4 << 20)),
        rounds_max=rng.choice((1, 2, 5)),
        latency_ms=rng.choice((1, 20, 200)),
        group_ms=rng.choice((0, 0, 30)),
        policy_notes=rng.randrange(len(POLICY_NAMES)),
        policy_pairs=rng.randrange(len(POLICY_NAMES)),
        policy_carts=rng.randrange(len(POLICY_NAMES)),
        stale_rows=rng.choice((0, 6, 20, 2000)),
    )
    for name, levels in LATER_LEVELS.items():
        own = stream(seed, f"knob {name}")
        if own.randrange(100) < LATER_PERCENT:
            chosen[name] = own.choice(levels)
    own = stream(seed, "what is wrong with images")
    chosen["image_faults"] = own.choice((0, 0, 30, 200)) if chosen.get("images") else 0
    own = stream(seed, "several nodes")
    if own.randrange(100) < LATER_PERCENT and not chosen["lmdb"]:
        chosen["nodes"] = own.choice((2, 2, 3))
        for name, levels in NODE_LEVELS.items():
            chosen[name] = own.choice((0, *levels))
    own = stream(seed, "devices in the background")
    if own.randrange(100) < LATER_PERCENT:
        chosen["live"] = own.choice((500, 1000))
        for name, levels in LIVE_LEVELS.items():
            chosen[name] = own.choice((0, 0, *levels))
        chosen["pages"] = stream(seed, "pages").choice((0, 1, 1, 2, 4))
    own = stream(seed, "overruled values")
    chosen["overruled_max"] = own.choice((0, 2, 10, 10_000, 10_000, 10_000))
    chosen["overruled_s"] = own.choice((5, 1_000_000, 1_000_000))
    own = stream(seed, "what is mostly so")
    chosen["singles"] = own.choice((0, 0, 0, 950))
    chosen["adopt_rows"] = own.choice((2_000, 2_000, 4))
    chosen["rounds"] = stream(seed, "rounds").choice((0, 1))
    chosen["marks"] = stream(seed, "marks").choice((0, 1))
    chosen["attempts"] = stream(seed, "attempts").choice((1, 1, 2, 5))
    return Knobs(**chosen)


def override(knobs: Knobs, settings: dict[str, int]) -> Knobs:
    """``knobs`` with some fixed. Raises ``ConfigError`` for an unknown knob."""
    names = {field.name for field in fields(Knobs)}
    for name in settings:
        if name not in names:
            raise ConfigError(f"there is no knob {name!r}; there are {', '.join(sorted(names))}")
    values: dict[str, Any] = dict(settings)
    return replace(knobs, **values)


def parse(settings: list[str]) -> dict[str, int]:
    """``["lost=0", "devices=2"]`` as a dictionary. Raises ``ConfigError``."""
    parsed = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not value.lstrip("-").isdigit():
            raise ConfigError(f"--knob {setting!r}: write name=number, such as lost=0")
        parsed[name] = int(value)
    return parsed


def shown(knobs: Knobs) -> str:
    """The knobs that are not zero, as they would be given to ``--knob``."""
    pairs = ((field.name, getattr(knobs, field.name)) for field in fields(Knobs))
    return " ".join(f"{name}={value}" for name, value in pairs if value)
