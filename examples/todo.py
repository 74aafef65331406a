"""A to-do list on the command line that works offline and syncs when there is a network.

    python examples/todo.py LIST add "buy milk"      LIST is a directory: the list on this device
    python examples/todo.py LIST show
    python examples/todo.py LIST done 1
    python examples/todo.py LIST drop 1
    python examples/todo.py LIST sync http://127.0.0.1:4984     token in ENTIDB_TOKEN, if needed

Without arguments it plays a little scene with two devices and a server in this process.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from entidb import Collection, Database, EntiDBError, SyncConfig, SyncEngine
from entidb.server import ServerConfig, serving
from entidb.sync import Merge

#: Two people who change different fields of one task both keep what they did.
CONFIG = SyncConfig(db_id="todo", client="todo-example", policies={"tasks": Merge()})


@dataclass
class Task:
    text: str
    done: bool = False


class TodoList:
    """The list in one directory. Every method is durable when it returns, network or not."""

    def __init__(self, directory: str | Path) -> None:
        self.db = Database.open(directory)
        self.tasks: Collection[Task] = self.db.collection("tasks", Task)

    def add(self, text: str) -> str:
        self.tasks.add(Task(text))
        return f"added {text!r}"

    def show(self) -> str:
        lines = [
            f"{number}. [{'x' if task.done else ' '}] {task.text}"
            for number, task in enumerate(self.tasks.values(), 1)
        ]
        return "\n".join(lines) or "nothing to do"

    def done(self, number: str) -> str:
        entity_id = self._id(number)
        with self.db.transaction() as tx:
            tasks = tx.collection("tasks", Task)
            task = tasks[entity_id]
            task.done = True
            tasks[entity_id] = task
        return f"done: {task.text}"

    def drop(self, number: str) -> str:
        return f"dropped: {self.tasks.pop(self._id(number)).text}"

    def sync(self, url: str) -> str:
        with SyncEngine(CONFIG, url, self.db, token=os.environ.get("ENTIDB_TOKEN")) as engine:
            result = engine.sync()
            lines = [f"pushed {result.pushed}, pulled {result.pulled}"]
            for resolved in result.conflicts:
                lines.append(f"both changed it: {resolved.resolution.action.value}")
            for withdrawn in engine.discarded():
                lines.append(f"not taken over: {withdrawn.message}: {withdrawn.values()}")
        return "\n".join(lines)

    def _id(self, number: str) -> uuid.UUID:
        ids = list(self.tasks)
        if not number.isdecimal() or not 1 <= int(number) <= len(ids):
            raise SystemExit(f"there is no task number {number}; `show` lists them")
        return ids[int(number) - 1]


def main(arguments: list[str]) -> None:
    """Run one command line: a directory, a command, its argument."""
    commands = {"add": 1, "show": 0, "done": 1, "drop": 1, "sync": 1}
    if len(arguments) < 2 or commands.get(arguments[1]) != len(arguments) - 2:
        raise SystemExit(__doc__)
    directory, command, *rest = arguments
    todo = TodoList(directory)
    try:
        print(getattr(todo, command)(*rest))
    finally:
        todo.db.close()


def play() -> None:
    """Two devices, one server, and a conflict."""
    scene = """
        phone   add "buy milk"
        phone   add "call Grandma"
        laptop  add "write the report"
        phone   sync URL
        laptop  sync URL
        laptop  show
        phone   done 1
        laptop  drop 2
        phone   drop 2
        laptop  add "book a table"
        phone   sync URL
        laptop  sync URL
        phone   sync URL
        phone   show
        laptop  show
    """
    with tempfile.TemporaryDirectory() as directory:
        config = ServerConfig(data_dir=f"{directory}/server", insecure_no_auth=True)
        with serving(config) as url:
            for line in scene.strip().splitlines():
                device, *command = shlex.split(line.replace("URL", url))
                print(f"\n{device}$ todo {shlex.join(command)}")
                main([f"{directory}/{device}", *command])


if __name__ == "__main__":
    try:
        main(sys.argv[1:]) if sys.argv[1:] else play()
    except EntiDBError as error:
        raise SystemExit(f"todo: {error}") from error
