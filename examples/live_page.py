"""A web page that updates itself: the server's own stream of news tells it when to read again.

    python examples/live_page.py            play a scene: a phone writes, the page hears of it
    python examples/live_page.py 8000       serve on that port until Ctrl-C, then open it

The page reads the stream of ``/sync/v1/live`` with a token for its database, as a device does. News
carries no data: each time the page asks the application for what it shows.
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
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route

from entidb import Database, ServerConfig, SyncConfig, SyncEngine, SyncServer, create_app
from entidb.server import mint_token

DB_ID = "kitchen"
SECRET = "an example's secret; a real one is random and in a file"
#: ``EventSource`` of browsers sends no token, so the page reads the stream itself.
PAGE = """<!doctype html>
<title>Orders</title>
<h1>Orders</h1>
<ul id="orders" aria-live="polite"></ul>
<script type="module">
  const token = "%s", orders = document.getElementById("orders");

  async function show() {
    const items = await (await fetch("/orders")).json();
    orders.replaceChildren(...items.map((item) => {
      const line = document.createElement("li");
      line.textContent = item.dish;
      return line;
    }));
  }

  async function listen() {
    const answer = await fetch("/sync/v1/live?db_id=kitchen", {
      headers: { accept: "text/event-stream", authorization: `Bearer ${token}` },
    });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      if (value.includes("event: head")) await show();
    }
  }

  for (;;) {
    try { await listen(); } catch (error) { console.log(error); }
    await new Promise((again) => setTimeout(again, 500 + 1500 * Math.random()));
  }
</script>
"""


def make_app(data_dir: str, secret_file: str) -> Starlette:
    """The application: a page, what it shows, and the sync server under ``/sync``."""
    server = SyncServer(ServerConfig(data_dir=data_dir, jwt_secret_file=secret_file))
    sync_app = create_app(server)

    def page(request: Request) -> Response:
        token = mint_token(SECRET, subject="a page", databases={DB_ID: "r"}, expires_s=3600)
        return HTMLResponse(PAGE % token)

    def orders(request: Request) -> Response:
        return JSONResponse(list(server.database(DB_ID).collection("orders").values()))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with sync_app.lifespan():
            yield
        server.close()

    server.database(DB_ID)
    routes = [Route("/", page), Route("/orders", orders), Mount("/sync", sync_app)]
    return Starlette(routes=routes, lifespan=lifespan)


@contextlib.contextmanager
def serving(app: Starlette, port: int = 0) -> Iterator[str]:
    """Run ``app`` in a thread; yields its URL."""
    config = uvicorn.Config(
        app, port=port, log_level="warning", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    bound = config.bind_socket()
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def scene(url: str) -> None:
    """What a browser does, step by step, while a phone writes."""
    token = httpx2.get(url).text.split('token = "')[1].split('"')[0]
    headers = {"accept": "text/event-stream", "authorization": f"Bearer {token}"}
    phone_token = mint_token(SECRET, subject="phone", databases={DB_ID: "rw"}, expires_s=600)
    with httpx2.stream("GET", f"{url}/sync/v1/live?db_id={DB_ID}", headers=headers) as stream:
        lines = stream.iter_lines()
        print("the page hears:", next(line for line in lines if line.startswith("data:")))
        phone = Database.in_memory()
        phone.collection("orders").add({"dish": "soup of the day"})
        with SyncEngine(SyncConfig(db_id=DB_ID), f"{url}/sync", phone, token=phone_token) as engine:
            engine.sync()
        print("the page hears:", next(line for line in lines if line.startswith("data:")))
    print("the page shows:", httpx2.get(f"{url}/orders").json())


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        secret_file = f"{directory}/secret"
        with open(secret_file, "w", encoding="utf-8") as file:
            file.write(SECRET)
        app = make_app(f"{directory}/server", secret_file)
        if len(sys.argv) > 1:
            with serving(app, int(sys.argv[1])) as url, contextlib.suppress(KeyboardInterrupt):
                print(f"open {url}")
                threading.Event().wait()
            return
        with serving(app) as url:
            scene(url)


if __name__ == "__main__":
    main()
