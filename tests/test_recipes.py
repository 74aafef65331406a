"""The recipes of docs/processes.md, the pages of docs/finding.md and the tests of
docs/testing.md: each run as it stands there, in processes of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from entidb import Database, DatabaseApplier
from tests.tools import NOT_RUN, PATIENT, free_port, package

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "processes.md"
#: Far beyond what a busy machine takes.
WAIT_S = 120.0

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="one process at a time has a database there"
    ),
]

#: What the recipe needs of FastAPI, on Starlette, for where FastAPI is not installed.
STAND_IN = """
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


class FastAPI(Starlette):
    def get(self, path):
        return self._serve(path, "GET")

    def post(self, path):
        return self._serve(path, "POST")

    def _serve(self, path, method):
        def keep(function):
            async def endpoint(request):
                made = run_in_threadpool(function, **request.query_params)
                if method == "GET":
                    made = function(**request.query_params)
                return JSONResponse(await made)

            self.router.add_route(path, endpoint, methods=[method])
            return function

        return keep
"""


def recipe(first: str, page: Path = PAGE) -> str:
    """The code that begins with the comment ``first``."""
    found = re.search(rf"```python\n(# {re.escape(first)}.*?)```", page.read_text(), re.DOTALL)
    assert found is not None, first
    return found[1]


def environment(directory: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(directory), str(ROOT / "src")])}


def run(directory: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment(directory),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def orders(directory: Path, count: int) -> None:
    with Database.open(directory / "shop.db") as db, db.transaction() as tx:
        for number in range(count):
            tx["orders"].add({"what": f"tea {number}", "state": "waiting"})


@contextlib.contextmanager
def served(directory: Path, command: list[str], at: str) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", command[0], *PATIENT[command[0]], *command[1:], at.format(port)],
        cwd=directory,
        env=environment(directory),
    )
    try:
        yield f"http://127.0.0.1:{port}/orders"
    finally:
        process.terminate()
        process.wait(WAIT_S)


def ask(url: str, method: str) -> bytes:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method)) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.URLError:
            assert time.monotonic() < deadline  # it is not there yet
            time.sleep(0.05)


def test_four_workers_of_an_asgi_app_take_orders(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(recipe("app.py"))
    if importlib.util.find_spec("fastapi") is None:
        (tmp_path / "fastapi.py").write_text(STAND_IN)
    command = ["uvicorn", "app:app", "--workers", "4", "--log-level", "warning", "--port"]
    with served(tmp_path, command, "{}") as url:
        assert ask(url, "GET") == b'{"orders":0}'
        with ThreadPoolExecutor(8) as pool:
            made = set(pool.map(lambda number: ask(f"{url}?what=tea", "POST"), range(40)))
        assert len(made) == 40
        assert ask(url, "GET") == b'{"orders":40}'
    with Database.open(tmp_path / "shop.db") as db:
        assert len(db["orders"]) == 40
        assert db.verify() == []


def test_a_page_hears_of_what_any_worker_commits(tmp_path: Path) -> None:
    if importlib.util.find_spec("fastapi") is None:
        pytest.skip(f"{NOT_RUN}fastapi is not installed")
    (tmp_path / "app.py").write_text(recipe("app.py"))
    (tmp_path / "live.py").write_text(recipe("live.py"))
    said = re.search(r"# live\.py: uvicorn (.*)", recipe("live.py"))
    assert said is not None
    command = ["uvicorn", *said[1].split(), "--log-level", "warning", "--port"]
    with served(tmp_path, command, "{}") as url:
        assert ask(url, "GET") == b'{"orders":0}'
        with urllib.request.urlopen(f"{url}/live", timeout=WAIT_S) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            seen = [stream.readline(), stream.readline()]
            for number in range(8):  # of four workers, several
                ask(f"{url}?what=tea{number}", "POST")
            while (line := stream.readline()).count(b"tea") < 8:
                assert line, "the stream has ended"
    assert seen == [b"data: []\n", b"\n"]


def test_programs_without_a_server_keep_nothing_for_one(tmp_path: Path) -> None:
    (tmp_path / "shop_db.py").write_text(recipe("shop_db.py"))
    run(tmp_path, sys.executable, "-c", "import shop_db; shop_db.database()['orders'].add({})")
    with Database.open(tmp_path / "shop.db") as db:
        assert len(db["orders"]) == 1
        assert not list(DatabaseApplier(db).pending())


TURNED = """
import pages

pages.stock.put_many({pages.db.new_id(): {"price": number % 7} for number in range(50)})
seen, following = [], None
while True:
    page = pages.page(following)
    seen += page["rows"]
    following = page["next"]
    if following is None:
        break
assert len({row["id"] for row in seen}) == 50
assert [row["price"] for row in seen] == sorted((row["price"] for row in seen), reverse=True)
try:
    pages.page("nonsense")
except pages.HTTPException as refused:
    print(refused.status_code, refused.detail[:25])
"""


def test_pages_are_turned_from_one_request_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "pages.py").write_text(recipe("pages.py", ROOT / "docs" / "finding.md"))
    if importlib.util.find_spec("fastapi") is None:
        (tmp_path / "fastapi.py").write_text(STAND_IN)
    assert run(tmp_path, sys.executable, "-c", TURNED) == "400 'nonsense' is no bookmark\n"


def test_the_tests_of_an_application_pass(tmp_path: Path) -> None:
    (tmp_path / "test_till.py").write_text(recipe("test_till.py", ROOT / "docs" / "testing.md"))
    said = run(tmp_path, sys.executable, "-m", "pytest", "-q", "-W", "error", "test_till.py")
    assert "3 passed" in said


def test_the_policy_of_the_page_on_testing_is_proved(tmp_path: Path) -> None:
    code = recipe("test_policy.py", ROOT / "docs" / "testing.md")
    few = code.replace("values=values)", "values=values, seeds=range(3))")
    assert few != code
    (tmp_path / "test_policy.py").write_text(few)
    said = run(tmp_path, sys.executable, "-m", "pytest", "-q", "-W", "error", "test_policy.py")
    assert "1 passed" in said


FORKING = """
import os, sys
import shop_db  # as gunicorn --preload does

children = []
for number in range(4):
    child = os.fork()
    if not child:
        for _ in range(10):
            shop_db.database()["orders"].add({"what": number})
        shop_db.database().close()
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] for child in children))
"""


def test_processes_forked_from_one_that_has_the_module_open_the_database_each(
    tmp_path: Path,
) -> None:
    (tmp_path / "shop_db.py").write_text(recipe("shop_db.py"))
    run(tmp_path, sys.executable, "-c", FORKING)
    with Database.open(tmp_path / "shop.db") as db:
        assert len(db["orders"]) == 40


#: A program of one view, with Django and without.
DJANGO = """
from django.conf import settings

settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="of a test", ALLOWED_HOSTS=["*"])

from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse
from django.urls import path

from shop_db import database


def orders(request):
    if request.method == "POST":
        database()["orders"].add({"what": "tea"})
    return JsonResponse({"orders": len(database()["orders"])})


from django.views.decorators.csrf import csrf_exempt

urlpatterns = [path("orders", csrf_exempt(orders))]
application = get_wsgi_application()
"""
PLAIN = """
from shop_db import database


def application(environ, start_response):
    if environ["REQUEST_METHOD"] == "POST":
        database()["orders"].add({"what": "tea"})
    start_response("200 OK", [("Content-Type", "application/json")])
    return [b'{"orders": %d}' % len(database()["orders"])]
"""


def test_the_recipe_for_fastapi_stands_on_itself() -> None:
    """Elsewhere it was run on Starlette, under ``STAND_IN``; the end of the run says so."""
    if importlib.util.find_spec("fastapi") is None:
        pytest.skip(f"{NOT_RUN}fastapi is not installed")
    code = compile(recipe("app.py"), "app.py", "exec")
    made: dict[str, object] = {}
    exec(code, made)
    assert type(made["app"]).__module__.startswith("fastapi")


@pytest.mark.parametrize("view", ["django", "plain"])
def test_four_workers_of_gunicorn_take_orders(tmp_path: Path, view: str) -> None:
    package("gunicorn")
    if view == "django":
        package("django")
    (tmp_path / "shop_db.py").write_text(recipe("shop_db.py"))
    (tmp_path / "site_app.py").write_text(DJANGO if view == "django" else PLAIN)
    command = ["gunicorn", "site_app:application", "--workers", "4", "--threads", "4", "--preload"]
    with served(tmp_path, [*command, "--log-level", "warning", "--bind"], "127.0.0.1:{}") as url:
        assert ask(url, "GET") == b'{"orders": 0}'
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: ask(url, "POST"), range(40)))
        assert ask(url, "GET") == b'{"orders": 40}'
    with Database.open(tmp_path / "shop.db") as db:
        assert len(db["orders"]) == 40
        assert db.verify() == []


def test_workers_of_a_queue_do_each_task_once(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(recipe("worker.py"))
    orders(tmp_path, 60)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: run(tmp_path, sys.executable, "worker.py"), range(3)))
    with Database.open(tmp_path / "shop.db") as db:
        done = list(db["orders"].values())
        assert {order["state"] for order in done} == {"done"}
        assert sorted(order["made"] for order in done) == sorted(f"TEA {n}" for n in range(60))
        # Taken once and finished once: two commits for each, and the one that made them.
        assert db.sequence == 1 + 2 * 60


def test_a_notebook_and_the_command_line_look_beside_a_service(tmp_path: Path) -> None:
    orders(tmp_path, 3)
    commands = re.findall(r"^entidb .*shop\.db.*$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 3
    with Database.open(tmp_path / "shop.db") as service:
        entity = next(iter(service["orders"]))
        service["orders"].patch(entity, state="done")
        printed = run(tmp_path, sys.executable, "-c", recipe("notebook"))
        assert printed == "Counter({'waiting': 2, 'done': 1})\n"
        for command in commands:
            printed = run(tmp_path, sys.executable, "-m", "entidb", *shlex.split(command)[1:])
            if " list " in command:
                assert str(entity) in printed and printed.count("tea") == 1
        service["orders"].add({"what": "more"})
