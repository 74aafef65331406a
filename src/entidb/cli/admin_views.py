"""What the server's administration answers, as lines for people. Everything in it may come from
strangers: ``say`` escapes it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from msgspec import json

from entidb.cli.output import facts, plural, size_text, table, time_text

Row = dict[str, Any]


def _time(row: Row, name: str) -> str:
    return "-" if row.get(name) is None else time_text(row[name])


def _count(row: Row, name: str) -> str:
    return "-" if row.get(name) is None else f"{row[name]:,}"


def _size(row: Row, name: str) -> str:
    return "-" if row.get(name) is None else size_text(row[name])


def _or_none(lines: Callable[[list[Row]], Iterable[str]], rows: list[Row]) -> Iterator[str]:
    if rows:
        yield from lines(rows)
    else:
        yield "none"


def databases(rows: list[Row]) -> Iterator[str]:
    heads = ("name", "size", "entities", "head", "devices", "last use", "")
    return _or_none(lambda found: table(map(_database_cells, found), heads), rows)


def _database_cells(row: Row) -> tuple[str, ...]:
    states = [word for word, is_so in (("open", row["open"]), ("frozen", "frozen" in row)) if is_so]
    return (
        row["name"],
        size_text(row["bytes"]),
        _count(row, "entities"),
        _count(row, "head"),
        f"{row['devices']:,}",
        _time(row, "used_ms"),
        ", ".join(states),
    )


def database(row: Row) -> Iterator[str]:
    yield from facts(_database_facts(row))


def _database_facts(row: Row) -> Iterator[tuple[str, str]]:
    yield "name", row["name"]
    yield "open", "yes" if row["open"] else "no"
    yield "size", size_text(row["bytes"])
    for name in ("entities", "head", "floor"):
        yield name, _count(row, name)
    yield "devices", f"{row['devices']:,}"
    yield "last use", _time(row, "used_ms")
    frozen = row.get("frozen")
    if frozen is not None:
        why = f": {frozen['reason']}" if frozen.get("reason") else ""
        yield "frozen", f"{time_text(frozen['since_ms'])} by {frozen['by']}{why}"


def aside(row: Row) -> Iterator[str]:
    yield f"{row['name']} is deleted; `entidb admin undelete {row['id']}` takes it back"
    yield f"until {time_text(row['until_ms'])}"


def deleted(rows: list[Row]) -> Iterator[str]:
    heads = ("id", "name", "deleted", "gone for good")
    cells = (
        (row["id"], row["name"], _time(row, "deleted_ms"), _time(row, "until_ms")) for row in rows
    )
    return _or_none(lambda _: table(cells, heads), rows)


_DEVICE_HEADS = ("device", "subject", "client", "last seen", "behind", "pushed", "last error", "")


def devices(rows: list[Row]) -> Iterator[str]:
    return _or_none(lambda found: table(map(_device_cells, found), _DEVICE_HEADS), rows)


def _device_cells(row: Row) -> tuple[str, ...]:
    device = row["device"]
    return (
        device["device_id"],
        device.get("subject", ""),
        device.get("client", "-"),
        _time(device, "last_ms"),
        _count(row, "behind"),
        f"{device.get('accepted', 0):,}",
        device.get("error", "-"),
        "revoked" if row.get("revoked") else "",
    )


def fleet(page: Row) -> Iterator[str]:
    rows = page["rows"]
    cells = ((row["database"], *_device_cells(row["row"])) for row in rows)
    yield from _or_none(lambda _: table(cells, ("database", *_DEVICE_HEADS)), rows)
    yield from _more(page["total"] - len(rows))


def _more(left: int) -> Iterator[str]:
    if left > 0:
        yield f"and {left:,} more: --limit shows them"


def device(story: Row) -> Iterator[str]:
    yield from facts(_device_facts(story["row"]))
    yield ""
    yield from happened(story["happened"])


def _device_facts(row: Row) -> Iterator[tuple[str, str]]:
    device = row["device"]
    yield "device", device["device_id"] + (" (revoked)" if row.get("revoked") else "")
    yield "subject", device.get("subject") or "-"
    yield "token", device.get("token", "-")
    yield "client", device.get("client", "-")
    yield "schema", _count(device, "schema")
    yield "first seen", _time(device, "first_ms")
    yield "last seen", _time(device, "last_ms")
    yield "was given", f"commit {device.get('cursor', 0):,}, {_count(row, 'behind')} behind"
    yield (
        "last error",
        f"{device['error']}, {_time(device, 'error_ms')}" if "error" in device else "-",
    )
    for name in ("requests", "accepted", "superseded", "conflicts", "rejected"):
        yield name, f"{device.get(name, 0):,}"
    yield "sent", size_text(device.get("bytes_in", 0))
    yield "received", size_text(device.get("bytes_out", 0))


def happened(rows: list[Row]) -> Iterator[str]:
    if not rows:
        yield "none; a server that shows the console (--console) keeps the latest"
        return
    heads = ("time", "what", "database", "device", "subject", "count", "commit", "code", "")
    yield from table(map(_happened_cells, rows), heads)


def _happened_cells(row: Row) -> tuple[str, ...]:
    wrote = [f"{each['collection']} {uuid.UUID(each['id'])}" for each in row.get("touched", [])]
    if row.get("more"):
        wrote.append(f"and {row['more']:,} more")
    return (
        _time(row, "at_ms"),
        row["what"],
        row["database"] or "-",
        row["device_id"] or "-",
        row["subject"] or "-",
        f"{row.get('count', 1):,}",
        _count(row, "version"),
        row.get("code", "-"),
        "; ".join(each for each in (row.get("message", ""), ", ".join(wrote)) if each),
    )


def collections(rows: list[Row]) -> Iterator[str]:
    heads = ("name", "entities", "")
    cells = (
        (row["name"], f"{row['entities']:,}", "" if row["synced"] else "not synced") for row in rows
    )
    return _or_none(lambda _: table(cells, heads), rows)


def entities(page: Row) -> Iterator[str]:
    heads = ("id", "version", "changed", "value")
    cells = (
        (row["id"], f"{row['version']:,}", _changed(row), _plain(row["value"]))
        for row in page["rows"]
    )
    yield from _or_none(lambda _: table(cells, heads), page["rows"])
    if page.get("after") is not None:
        yield f"there are more: --after {page['after']}"


def _plain(value: Any) -> str:
    return json.encode(value).decode()


def _changed(row: Row) -> str:
    return _time(row, "changed_ms") if row["changed_ms"] else "-"


def entity(row: Row) -> Iterator[str]:
    yield from facts(
        [
            ("id", row["id"]),
            ("version", f"{row['version']:,}"),
            ("device", row["device_id"]),
            ("changed", _changed(row)),
            ("size", size_text(row["bytes"])),
            ("value", _plain(row["value"])),
        ]
    )
    if not row["whole"]:
        yield "the value is large and was cut: `entidb get` beside the database shows all of it"


def overview(row: Row) -> Iterator[str]:
    yield from facts(_overview_facts(row))


def _overview_facts(row: Row) -> Iterator[tuple[str, str]]:
    yield "version", f"EntiDB {row['version']}, process {row['process']}"
    yield "since", _time(row, "since_ms")
    fleet = row["fleet"]
    yield "databases", f"{fleet['databases']:,}, {row['open_databases']:,} open"
    yield (
        "devices",
        (f"{fleet['devices']:,}, {fleet['behind']:,} behind, {fleet['revoked']:,} revoked"),
    )
    yield "memory", _size(row, "memory_bytes")
    yield "disk", f"{_size(row, 'disk_free_bytes')} free of {_size(row, 'disk_bytes')}"
    yield "waiting", plural(row["waiting"], "push", "pushes")
    yield "in flight", size_text(row["in_flight_bytes"])
    yield "tasks", f"{row['tasks']:,} under way, {row['tasks_failed']:,} failed"
    late = ", ".join(row["late_backups"])
    yield "backups", f"late: {late}" if late else "in time" if row["backups"] else "none are made"
    if len(row["nodes"]) > 1:
        yield "nodes", f"{len(row['nodes']):,}"
    beats = row["beats"]
    if beats:
        yield (
            "last minutes",
            (
                f"{sum(each['requests'] for each in beats):,} requests, "
                f"{sum(each['failed'] for each in beats):,} failed; transactions: "
                f"{sum(each['accepted'] for each in beats):,} accepted, "
                f"{sum(each['conflicts'] for each in beats):,} in conflict, "
                f"{sum(each['rejected'] for each in beats):,} rejected"
            ),
        )


def quotas(answer: Row) -> Iterator[str]:
    settings = answer["settings"]
    if not any(settings.values()):
        yield "this server has no quotas: `entidb serve --help` names them (--database-bytes-max)"
        return
    yield from facts((name, _allowed(name, most)) for name, most in settings.items() if most)
    if answer["rows"]:
        yield ""
        yield from table(map(_quota_cells, answer["rows"]), ("database", "quota", "used", "of", ""))
    yield from _more(answer["total"] - len(answer["rows"]))


def _quota_cells(row: Row) -> tuple[str, ...]:
    used, quota = row.get("used"), row["quota"]
    return (
        row["database"],
        f"{quota} of {row['subject']}" if "subject" in row else quota,
        "-" if used is None else _allowed(quota, used),
        _allowed(quota, row["allowed"]),
        "" if used is None else f"{100 * used / row['allowed']:.0f} %",
    )


def _allowed(quota: str, number: float) -> str:
    return size_text(int(number)) if quota == "database_bytes_max" else f"{number:,.10g}"


def images(rows: list[Row]) -> Iterator[str]:
    heads = ("database", "made", "commit", "behind", "entities", "files", "size", "packing", "")
    return _or_none(lambda found: table(map(_image_cells, found), heads), rows)


def _image_cells(row: Row) -> tuple[str, ...]:
    states = {True: "offered", False: "not any more", None: "not open"}
    return (
        row["database"],
        _time(row, "made_ms") if row["made_ms"] else "-",
        f"{row['head']:,}",
        _count(row, "behind"),
        f"{row['entities']:,}",
        f"{row['segments']:,}",
        size_text(row["bytes"]),
        row["packing"],
        states[row.get("counts")],
    )


def revocation(row: Row) -> Iterator[str]:
    place = f"in {row['db_id']}" if row.get("db_id") else "everywhere"
    yield f"{row['kind']} {row['name']} is revoked {place}"


def revoked(rows: list[Row]) -> Iterator[str]:
    heads = ("kind", "name", "database", "since", "by", "reason")
    cells = (
        (
            row["kind"],
            row["name"],
            row.get("db_id", "all"),
            _time(row, "since_ms"),
            row["by"],
            row.get("reason", ""),
        )
        for row in rows
    )
    return _or_none(lambda _: table(cells, heads), rows)


def changed(answer: Row) -> Iterator[str]:
    yield "done" if answer["changed"] else "there was nothing to change"


def keys(rows: list[Row]) -> Iterator[str]:
    heads = ("kid", "algorithm", "ends")
    cells = (
        (
            row.get("kid") or "(without a name)",
            row["algorithm"],
            "-" if row.get("ends") is None else time_text(round(row["ends"] * 1000)),
        )
        for row in rows
    )
    return _or_none(lambda _: table(cells, heads), rows)


def audit(rows: list[Row]) -> Iterator[str]:
    heads = ("time", "who", "from", "action", "database", "result", "")
    return _or_none(lambda found: table(map(_audit_cells, found), heads), rows)


def _audit_cells(row: Row) -> tuple[str, ...]:
    said = [f"{name}={text}" for name, text in row.get("details", {}).items()]
    if row.get("count") is not None:
        said.append(plural(row["count"], "time"))
    return (
        _time(row, "time_ms"),
        row["who"] or "-",
        row["where"],
        row["action"],
        row.get("database", "-"),
        row.get("result", "done"),
        " ".join(said),
    )


def backups(rows: list[Row]) -> Iterator[str]:
    heads = ("database", "id", "size", "entities", "head", "")
    cells = (
        (
            row["database"],
            row["id"],
            size_text(row["bytes"]),
            f"{row.get('entities', 0):,}",
            f"{row.get('head', 0):,}",
            plural(len(row["faults"]), "fault") if row.get("faults") else "verified",
        )
        for row in rows
    )
    return _or_none(lambda _: table(cells, heads), rows)


def nodes(rows: list[Row]) -> Iterator[str]:
    heads = ("name", "host", "process", "version", "address", "began", "last seen", "")
    return _or_none(lambda found: table(map(_node_cells, found), heads), rows)


def _node_cells(row: Row) -> tuple[str, ...]:
    return (
        row["name"],
        row["host"],
        str(row["process"]),
        row["version"],
        row.get("address", "-"),
        time_text(row["began_ms"]),
        time_text(row["seen_ms"]),
        "on duty" if row.get("on_duty") else "",
    )


def tasks(rows: list[Row]) -> Iterator[str]:
    heads = ("id", "task", "database", "state", "step", "by", "ended")
    return _or_none(lambda found: table(map(_task_cells, found), heads), rows)


def _task_cells(row: Row) -> tuple[str, ...]:
    step = row.get("step", "")
    if row.get("total"):
        step = f"{step} {row.get('done', 0):,} of {row['total']:,}"
    return (
        str(row["id"]),
        row["kind"],
        row.get("database", "all"),
        row.get("state", "waiting"),
        row.get("error") or step,
        row["by"],
        _time(row, "ended_ms"),
    )


def task(row: Row) -> Iterator[str]:
    yield from facts(
        [
            ("task", f"{row['id']} ({row['kind']})"),
            ("database", row.get("database", "all")),
            ("state", row.get("state", "waiting")),
            *((name, str(value)) for name, value in row.get("result", {}).items()),
        ]
    )


def preview(row: Row) -> Iterator[str]:
    found = [(name, str(count)) for name, count in row["collections"].items()]
    yield from facts([*found, ("entities", str(row["entities"])), ("confirm", row["confirm"])])
