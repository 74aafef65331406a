"""A web application that already exists gets a sync server: one mount, and one line of lifespan.

    python examples/mounted_app.py            play a scene: a device, the web, and back
    python examples/mounted_app.py 8000       serve on that port until Ctrl-C

The application's own routes read and write the same database that the devices synchronise, through
the same core: what a device pushed is on the web page, what the web form wrote reaches the devices.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from entidb import Database, ServerConfig, SyncConfig, SyncEngine, SyncServer, create_app
from entidb.server import mint_token

DB_ID = "guestbook"
SECRET = "an example's secret; a real one is random and in a file"


def make_app(data_dir: str, secret_file: str) -> Starlette:
    """The application: two routes of its own, and the sync server under ``/sync``."""
    server = SyncServer(ServerConfig(data_dir=data_dir, jwt_secret_file=secret_file))
    sync_app = create_app(server)

    def entries(request: Request) -> Response:
        """What everybody wrote, devices and web, in order."""
        return JSONResponse(list(server.database(DB_ID).collection("entries").values()))

    def write(text: str) -> None:
        server.database(DB_ID).collection("entries").add({"from": "web", "text": text})

    async def sign(request: Request) -> Response:
        # A commit waits for the disk, so it does not belong on the event loop.
        await run_in_threadpool(write, (await request.body()).decode())
        return PlainTextResponse("thank you\n", status_code=201)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # A server does not tell mounted apps when it starts and stops, so this does.
        async with sync_app.lifespan():
            yield
        server.close()

    routes = [
        Route("/entries", entries),
        Route("/entries", sign, methods=["POST"]),
        Mount("/sync", sync_app),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


@contextlib.contextmanager
def running(app: Starlette) -> Iterator[str]:
    """Serve ``app`` on a free port of this machine while the block runs; yields its URL."""
    web = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=web.run)
    thread.start()
    try:
        while not web.started:
            if not thread.is_alive():
                raise SystemExit("the web server did not start")
            thread.join(0.01)
        port = web.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        web.should_exit = True
        thread.join()


def play(directory: str, app: Starlette) -> None:
    token = mint_token(SECRET, subject="visitor's phone", databases=[DB_ID])
    with running(app) as url, Database.open(f"{directory}/phone") as db:
        config = SyncConfig(db_id=DB_ID, client="mounted-app-example")
        with SyncEngine(config, f"{url}/sync", db, token=token) as engine:
            db.collection("entries").add({"from": "phone", "text": "hello from the phone"})
            print(f"phone: pushed {engine.sync().pushed}")
            print("GET /entries:", httpx2.get(f"{url}/entries").json())
            answer = httpx2.post(f"{url}/entries", content="hello from the web")
            print("POST /entries:", answer.status_code)
            print(f"phone: pulled {engine.sync().pulled}")
            for entry in db.collection("entries").values():
                print("on the phone:", entry)


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        secret_file = f"{directory}/secret"
        with open(secret_file, "w", encoding="utf-8") as file:
            file.write(SECRET)
        app = make_app(f"{directory}/data", secret_file)
        if arguments:
            uvicorn.run(app, port=int(arguments[0]))
        else:
            play(directory, app)


if __name__ == "__main__":
    main(sys.argv[1:])
