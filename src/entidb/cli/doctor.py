"""``doctor``: what is wrong with how a server is run, found by looking and by trying.

What is looked at on the machine of the server is in ``doctor_directory``, what nodes need of their
PostgreSQL in ``doctor_postgres``, and what is tried from afar in ``doctor_network``. None of them
changes a database, and only ``--mend`` changes anything.
"""

from __future__ import annotations

import dataclasses

import click

from entidb.cli.doctor_findings import Finding, State
from entidb.cli.exits import Exit, UsageError
from entidb.cli.output import one_line, plural, say
from entidb.cli.values import Bounded, print_json
from entidb.cli.words import json_option, not_empty
from entidb.credentials import read_token
from entidb.storage.addresses import is_address

_MARKS = {State.OK: "ok", State.WARNING: "warning", State.PROBLEM: "PROBLEM", State.SKIPPED: "-"}


@click.command("doctor")
@click.argument("place", metavar="DIR|ADDRESS|URL")
@click.argument("settings", metavar="[-- SETTINGS OF SERVE]", nargs=-1, type=click.UNPROCESSED)
@click.option("--mend", is_flag=True, help="DIR: make files with secrets readable for their owner "
              "alone.")  # fmt: skip
@click.option("--token-file", metavar="FILE", envvar="ENTIDB_TOKEN_FILE", show_envvar=True,
              help="URL: file with a token; what needs one is tried only with it.")  # fmt: skip
@click.option("--db", "db_id", metavar="NAME", envvar="ENTIDB_DB", show_envvar=True,
              help="URL: a database of the server that the token grants.")  # fmt: skip
@click.option("--ca-file", metavar="FILE", help="URL: certificate authorities to trust instead of "
              "the system's.")  # fmt: skip
@click.option("--wait", default=30.0, show_default=True, type=Bounded(0.5, 3600),
              help="URL: seconds for which a connection is kept idle, to find what cuts it.",
              )  # fmt: skip
@json_option
def doctor_command(
    place: str,
    settings: tuple[str, ...],
    mend: bool,
    token_file: str | None,
    db_id: str | None,
    ca_file: str | None,
    wait: float,
    as_json: bool,
) -> int:
    """Look for what is wrong with how a server is run, and say what to change.

    With DIR, on the server's own machine: settings, permissions, clock, disk, open files and
    backups; give the settings of `entidb serve` after `--`. With the address of a PostgreSQL
    database, what nodes need of that. With URL, from a device: the clock, the certificate, and what
    a proxy on the way lets through. Exit code 9: there are problems.
    """
    if is_address(place):
        if mend or token_file is not None:
            raise UsageError("--mend and --token-file are for DIR or URL, and not for PostgreSQL")
        from entidb.cli.doctor_postgres import look_at

        found = look_at(place, settings)
    elif "://" in not_empty("DIR", place):
        if settings or mend:
            raise UsageError("settings and --mend are for DIR, on the machine of the server")
        from entidb.cli.doctor_network import Visit, examine

        token = None if token_file is None else read_token(token_file)
        found = examine(Visit(place, token, db_id, ca_file, wait))
    else:
        from entidb.cli.doctor_directory import look

        files = [] if token_file is None else [token_file]
        found = look(place, settings, files, mend=mend)
    report = _report_json if as_json else _report
    report(found)
    return Exit.FAULTS if any(each.state is State.PROBLEM for each in found) else Exit.OK


def _report_json(found: list[Finding]) -> None:
    for each in found:
        print_json(dataclasses.asdict(each))


def _report(found: list[Finding]) -> None:
    for each in found:
        say(f"{_MARKS[each.state]:8} {each.check}: {one_line(each.says)}")
        if each.change is not None:
            say(f"{'':8} change: {one_line(each.change)}")
    problems = sum(each.state is State.PROBLEM for each in found)
    warnings = sum(each.state is State.WARNING for each in found)
    say(f"{plural(problems, 'problem')}, {plural(warnings, 'warning')}")
