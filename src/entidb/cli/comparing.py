"""``verify --server``: a device's database compared with its server, and repaired (R34)."""

from __future__ import annotations

from entidb.cli.exits import Exit, UsageError
from entidb.cli.output import plural, progress, say, warn_of_exposure
from entidb.cli.syncing import on_a_thread, policies_of, token_of
from entidb.cli.values import print_json
from entidb.cli.words import opened
from entidb.errors import ConfigError
from entidb.sync import DatabaseApplier, RetryConfig, SyncConfig, SyncEngine, Verification
from entidb.version import VERSION

#: Differences that are printed one by one; --json has all.
_SHOWN_MAX = 20
#: As where a database has faults of its own.
_CODE = "faults"


def compare(
    path: str,
    url: str,
    token: str | None,
    token_file: str | None,
    policies: tuple[str, ...],
    *,
    repair: bool,
    as_json: bool,
) -> int:
    """Synchronise, compare, and say what differs; the exit code."""
    provider = token_of(token, token_file)
    with opened(path) as database:
        if database.role.value == "server":
            raise ConfigError(f"{path} is a server's database: only a device's has a server")
        db_id = DatabaseApplier(database).state().db_id
        if db_id is None:
            raise UsageError(f"{path} was never synchronised: `entidb sync` it first")
        config = SyncConfig(
            db_id=db_id,
            client=f"entidb-cli/{VERSION}",
            retry=RetryConfig(),
            **policies_of(policies),
        )
        with (
            SyncEngine(config, url, database, token=provider) as engine,
            progress("comparing", None, unit="rows"),
        ):
            found = on_a_thread(engine, lambda: engine.verify_with_server(repair=repair))
    if as_json:
        print_json(_document(path, url, found))
    else:
        for line in _lines(path, url, found):
            say(line)
    if token_file is not None and token is None:
        warn_of_exposure(token_file, "token file")
    return _exit_of(path, found, repair=repair)


def _exit_of(path: str, found: Verification, *, repair: bool) -> int:
    if found.agrees or (repair and not found.more and found.repaired == len(found.differences)):
        return Exit.UNRESOLVED if found.unresolved else Exit.OK
    from entidb.cli.app import fail

    does = "run it again" if repair else "put them right with --repair"
    differences = plural(len(found.differences), "entity differs", "entities differ")
    return fail(_CODE, f"{differences} in {path}; {does}", Exit.FAULTS)


def _document(path: str, url: str, found: Verification) -> dict[str, object]:
    return {
        "path": path,
        "server": url,
        "ok": found.agrees,
        "cursor": found.cursor,
        "collections": found.collections,
        "entities": found.entities,
        "differences": [
            {
                "collection": each.collection,
                "id": str(each.id),
                "kind": each.kind,
                "version": each.version,
            }
            for each in found.differences
        ],
        "more": found.more,
        "skipped": found.skipped,
        "repaired": found.repaired,
        "withdrawn": found.withdrawn,
        "unresolved": found.unresolved,
    }


def _lines(path: str, url: str, found: Verification) -> list[str]:
    compared = plural(found.entities, "entity", "entities")
    lines = [str(each) for each in found.differences[:_SHOWN_MAX]]
    if len(found.differences) > _SHOWN_MAX:
        lines.append(f"and {len(found.differences) - _SHOWN_MAX:,} more; --json names them")
    if found.more:
        lines.append("there may be more differences: verify again when these are put right")
    lines += [f"{name} cannot be compared yet: sync again" for name in found.skipped]
    if found.agrees:
        lines.append(f"{path} agrees with {url}: {compared} compared at commit {found.cursor:,}")
    if found.repaired:
        lines.append(f"{plural(found.repaired, 'entity', 'entities')} put right")
    if found.withdrawn:
        lost = plural(found.withdrawn, "pending transaction")
        lines.append(f"{lost} withdrawn in that: see `entidb discarded`")
    if found.unresolved:
        lines.append(f"{plural(found.unresolved, 'conflict')} to decide: see `entidb conflicts`")
    return lines


__all__ = ["compare"]
