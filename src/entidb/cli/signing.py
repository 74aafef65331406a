"""``logout``: somebody leaves a device, and what becomes of what they have not synchronised (R36).
Nothing here needs a network.
"""

from __future__ import annotations

import click

from entidb.cli.output import plural, say
from entidb.cli.values import print_json
from entidb.cli.words import bind, elsewhere, json_option, opened, words
from entidb.db import Role
from entidb.errors import ConfigError
from entidb.sync import DatabaseApplier
from entidb.sync.others import Others
from entidb.sync.turnover import check_logout, sign_off

_SAID = {
    "keep": "kept for {who}: a sync with their token pushes it",
    "discard": "discarded",
    "export": "written to {file}, and taken out of the database",
}


@click.command("logout")
@words("")
@click.option("--pending", type=click.Choice(("keep", "discard", "export")), required=True,
              help="What becomes of what they have pending.")  # fmt: skip
@click.option("--file", metavar="FILE", help="With export: a new file, a line of JSON for each "
              "transaction.")  # fmt: skip
@click.option("--subject", metavar="NAME", help="With keep, before the first sync: who their token "
              "will be for.")  # fmt: skip
@json_option
def logout_command(
    words: tuple[str, ...],
    directory: str | None,
    pending: str,
    file: str | None,
    subject: str | None,
    as_json: bool,
) -> None:
    """Let somebody else have this device.

    What is pending goes to the server under the subject of the token that committed it, and under
    no other. What the device holds stays here; for another person's eyes use another directory.
    """
    path = bind(words, directory).path
    check_logout(pending, file, subject)
    if file is not None:
        elsewhere("--file", file)
    with opened(path) as database:
        if database.role is Role.SERVER:
            raise ConfigError(f"{path} is a server's database: nobody signs in there")
        applier = DatabaseApplier(database)
        who = applier.state().subject or subject
        with Others(database, database.clock).kept_out():
            count = sign_off(applier, pending, file, subject)
    if as_json:
        print_json({"pending": pending, "subject": who, "transactions": count, "file": file})
        return
    done = _SAID[pending].format(who=who, file=file)
    say(
        f"{who or 'nobody'} is signed out; {plural(count, 'transaction')} {done}"
        if count
        else f"{who or 'nobody'} is signed out; nothing was pending"
    )


__all__ = ["logout_command"]
